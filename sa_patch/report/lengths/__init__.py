"""What prompts of several lengths tell: needles by depth, scores by length, and RULER's table."""
