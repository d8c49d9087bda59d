#!/usr/bin/env bash
# Train the study "quick" from scratch, and write its page to build/paper-quick/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/paper-quick
rm -rf "$folder"
python -m benchmarks.paper train quick --work "$folder/runs" --results "$folder/records"
python -m benchmarks.paper write quick --results "$folder/records" --docs "$folder"
