"""Benchmarks of lars_tree and other packages, in one process: `python -m benchmarks`.

`trees.py` makes the weights, `contestants.py` the steps that are compared. `measure.py` and
`memory.py` measure, `sections.py` says what. `targets.py` has the aims, `report.py` and `plots.py`
show the results. `training.py` is a separate experiment on accuracy.
"""
