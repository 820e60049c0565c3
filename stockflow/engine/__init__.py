"""What merges: inputs, arithmetic, the ordered writer, and the worker that drives them."""
