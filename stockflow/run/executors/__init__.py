"""Executors: submit, wait, cancel. They know nothing about merging."""
