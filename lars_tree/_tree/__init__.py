"""Trees: walk, match by key, broadcast, rebuild. Knows no arrays."""
