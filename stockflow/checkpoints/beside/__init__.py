"""Files beside the weights: which go out, which stay behind."""
