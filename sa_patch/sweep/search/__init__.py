"""``sa-patch search``: the composition that keeps the most within a budget."""
