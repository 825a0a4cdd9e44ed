"""The twin of the native engine: updates arrays in CPU memory with numpy."""
