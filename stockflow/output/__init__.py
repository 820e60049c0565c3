"""Who may write into an output, what is recorded there, what of it is still good."""
