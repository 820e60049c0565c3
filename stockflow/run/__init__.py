"""A merge from a recipe to a manifest, here or on a cluster."""
