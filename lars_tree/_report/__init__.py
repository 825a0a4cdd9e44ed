"""The parts of `lars_tree.report`: measurements, their history, tables and plots."""
