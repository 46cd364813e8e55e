"""Bases of transformers from their folders: tokenizers, weights, heads; and where and in which dtype they run."""
