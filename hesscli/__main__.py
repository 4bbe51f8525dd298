"""`python -m hesscli` is `hesscli`."""

from hesscli.cli import run

if __name__ == "__main__":
    run()
