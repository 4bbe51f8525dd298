"""`python -m hesscli` is `hesscli`."""

from hesscli.cli import main

main()
