"""`python -m deltafl`."""

from deltafl.cli import main

main()
