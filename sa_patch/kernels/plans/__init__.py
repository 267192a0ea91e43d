"""Block plans: what a kernel that walks lists of key blocks is told of a pattern."""
