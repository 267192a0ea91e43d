"""How fast is attention over each pattern: the benchmark and the goal sheet of a GPU."""
