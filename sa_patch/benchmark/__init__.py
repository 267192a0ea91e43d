"""HOW FAST: attention layers and whole models, beside their rivals."""
