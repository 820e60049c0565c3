"""``python -m stockflow``."""

from stockflow.cli import main

main()
