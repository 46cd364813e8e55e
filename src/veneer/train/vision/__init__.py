"""Tasks on pictures: where pictures are read from, how they are prepared, and what is learned from them."""
