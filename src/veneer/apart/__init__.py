"""Adapters apart from any model: what one does to each layer, as plain data."""
