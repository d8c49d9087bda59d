"""What finished runs prove: their order, their weights, and that layouts decide nothing."""
