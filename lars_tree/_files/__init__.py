"""Trees in files: names, elements, formats, shards, and atomic replacement. Used by `io.py`."""
