"""Files, folders and datasets become rows and pictures, which know where they came from."""
