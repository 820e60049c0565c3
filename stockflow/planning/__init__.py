"""Everything decided before a byte moves: pure functions of headers, recipe and budget."""
