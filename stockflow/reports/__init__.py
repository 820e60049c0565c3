"""What a finished merge did and how it ran, from its records."""
