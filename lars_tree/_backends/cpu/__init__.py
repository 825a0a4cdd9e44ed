"""The twin: the engine for CPU memory in numpy."""
