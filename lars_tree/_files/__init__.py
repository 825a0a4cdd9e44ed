"""Trees in files: names, elements, the two formats, and files that are replaced in one step.

What users call is in `io.py`.
"""
