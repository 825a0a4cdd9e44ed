"""Benchmarks of lars_tree, side by side with other packages: `python -m benchmarks`.

`trees.py` makes the weights, `contestants.py` the steps that are compared, `measure.py` the times,
`memory.py` the peak memory, `targets.py` says what is aimed at, `report.py` and `plots.py` show it.
"""
