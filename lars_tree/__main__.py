"""`python -m lars_tree` runs the `lars-tree` command."""

from __future__ import annotations

import sys

from lars_tree.cli import main

if __name__ == "__main__":
    sys.exit(main())
