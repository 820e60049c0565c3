"""What a plan asks for, and what it will take."""
