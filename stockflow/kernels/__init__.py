"""The arithmetic on the processor: loops over bytes, compiled once. No names, no I/O."""
