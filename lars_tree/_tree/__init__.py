"""Trees: walk, match by key, broadcast, rebuild. Does not depend on arrays."""
