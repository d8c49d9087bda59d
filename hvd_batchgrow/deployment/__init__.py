"""Use the weights of a run: predict, evaluate, export."""
