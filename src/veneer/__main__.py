"""`python -m veneer`, as launchers call it."""

from veneer.cli import main

main()
