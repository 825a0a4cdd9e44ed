"""The subcommands of `lars-tree`, as functions; `parser.py` defines their arguments."""
