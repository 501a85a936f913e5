"""`python -m tacfast`."""

from tacfast.cli import main

main()
