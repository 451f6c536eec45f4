"""``python -m nlsurgery`` is the command ``nlsurgery``."""

from nlsurgery.cli.app import main

if __name__ == "__main__":
    main()
