"""How fast is attention over each pattern, in one layer, beside its rivals."""
