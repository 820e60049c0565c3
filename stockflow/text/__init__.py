"""Words and JSON: what is read strictly, what is said, what must not be seen."""
