"""Pictures from words: adapters for the denoisers and text encoders of diffusers' pipelines."""
