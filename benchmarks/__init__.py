"""Benchmarks of lars_tree and other packages, in one process: `python -m benchmarks`.

`trees.py` makes the weights; `contestants.py` makes the steps that are compared. `measure.py` and
`memory.py` measure; `sections.py`, `odd.py` and `shards.py` define the measurements. `targets.py`
has the targets; `report.py` and `plots.py` show the results. Three separate programs are `gpu.py`,
which measures on a GPU (with `gpu_steps.py` and `device.py`), `training.py`, an experiment on
accuracy (reported by `training_page.py`), and `pictures.py`, which draws the pictures of
docs/reports.md.
"""
