"""What knows nothing of adapters: patterns that cannot hang, files read within limits and written whole."""
