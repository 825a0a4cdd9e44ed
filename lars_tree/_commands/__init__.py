"""What the subcommands of `lars-tree` do, as plain functions; what they take is in `parser.py`."""
