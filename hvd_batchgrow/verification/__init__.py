"""Check the sample order and the weights of runs, and that a job gives equal weights in all layouts."""
