"""How a merge gets on, told to terminals, logs, metrics and whoever asks from elsewhere."""
