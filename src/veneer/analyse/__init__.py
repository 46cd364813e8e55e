"""What an adapter is: numbers and words about it, without a model."""
