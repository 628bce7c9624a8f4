"""`python -m capdistill` is the command `capdistill`."""

from __future__ import annotations

import sys

from capdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
