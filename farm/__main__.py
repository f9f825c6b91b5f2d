"""`python -m farm`: the `farm` command."""

from farm.cli.app import run

if __name__ == "__main__":
    run()
