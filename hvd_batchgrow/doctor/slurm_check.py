"""The check of Slurm."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_batchgrow.doctor.check import Check, Facts, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.doctor.tool import first_line, tool_facts


def slurm_facts() -> Facts:
    """Return the version of sbatch, and the answer of `scontrol ping`."""
    version = tool_facts(["sbatch", "--version"])
    return {"sbatch": dict(version), "ping": dict(tool_facts(["scontrol", "ping"])) if version["path"] else {}}


def check_slurm(facts: Mapping[str, Facts]) -> Check:
    """Check that Slurm answers. `submit` and `status` need it; training does not."""
    slurm = facts_of(facts, "slurm")
    sbatch, ping = slurm["sbatch"], slurm["ping"]
    if sbatch["path"] is None:
        return note("Slurm", "sbatch is not on PATH: submit and status need a login node of a cluster")
    if "error" in sbatch:
        return note("Slurm", sbatch["error"], "ask the administrator")
    if sbatch["code"]:
        found = f"{sbatch['path']} fails: {first_line(sbatch['output'])}"
        return note("Slurm", found, "run submit on a login node of the cluster")
    version = first_line(sbatch["output"])
    if ping.get("code") != 0:
        why = ping.get("error") or first_line(ping.get("output", "")) or "scontrol is not on PATH"
        return note("Slurm", f"{version}, but its controller does not answer: {why}", "scontrol ping")
    return ok("Slurm", f"{version}; {first_line(ping['output'])}")
