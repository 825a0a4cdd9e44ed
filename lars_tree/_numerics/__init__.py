"""The formula, double-double numbers, bfloat16 and the floating-point environment."""
