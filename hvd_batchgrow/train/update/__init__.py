"""One update: the sums of all passes on all ranks, made into a step."""
