"""`python -m mmalign` is the same as the `mmalign` command."""

from mmalign.cli.main import main

main()
