"""The path of a step: `advance` works on trees, `execute` on flat lists of arrays."""
