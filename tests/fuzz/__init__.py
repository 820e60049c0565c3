"""Malformed inputs: made from valid ones, given to every reader of what others wrote."""
