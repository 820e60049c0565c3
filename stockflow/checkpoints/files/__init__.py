"""Files that hold tensors: which they are, and where in them each lies."""
