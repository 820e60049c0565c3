"""The config that is published."""
