"""`python -m awqconv`."""

from awqconv.cli import main

main()
