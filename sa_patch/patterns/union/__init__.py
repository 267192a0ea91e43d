"""Unions of patterns: their normal form, what they show, and their seeds."""

from sa_patch.patterns.union.seeds import seed_of, with_seed
from sa_patch.patterns.union.union import Union, parts_of, split_tail, unite

__all__ = ["Union", "parts_of", "seed_of", "split_tail", "unite", "with_seed"]
