"""Trees in files: names, elements, the two formats, and atomic replacement. Used by `io.py`."""
