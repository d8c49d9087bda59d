"""One update: sum the gradients of all micro-batches on all ranks, and do one optimizer step."""
