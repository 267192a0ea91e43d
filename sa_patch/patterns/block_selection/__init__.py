"""Choosing blocks of keys by content, for the patterns that do."""
