"""Reports of runs: one document as data, and its renderers for HTML, Markdown, CSV and pictures; without torch."""
