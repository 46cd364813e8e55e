"""Starting values of a fresh LoRA from a few batches: one file each. The base is not moved, and is left as it was."""
