"""The subcommands of `lars-tree`, as functions; `parser.py` has their arguments."""
