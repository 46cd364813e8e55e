"""What an adapter is, and what a live model carries: numbers and words."""
