"""What a run saves of itself, and how it is found again."""
