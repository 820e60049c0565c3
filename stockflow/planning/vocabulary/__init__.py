"""The output's vocabulary, and the files that say it."""
