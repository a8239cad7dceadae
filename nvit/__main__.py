"""`python -m nvit`, so that launchers such as torchrun can start it."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
