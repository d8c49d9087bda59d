"""What runs have done, read from the files in their folders, and statistics that compare runs; without torch."""
