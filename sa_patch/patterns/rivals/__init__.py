"""Training-free sparse attention of others, each from its paper: one file per method."""
