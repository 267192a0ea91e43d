"""WHICH keys may a query see: index mathematics, one file per pattern."""

from sa_patch.patterns.base import Pattern
from sa_patch.patterns.full import Full
from sa_patch.patterns.moba import MoBA
from sa_patch.patterns.registry import PATTERNS, make_pattern, parse_pattern
from sa_patch.patterns.sa import SA
from sa_patch.patterns.swa import SWA

__all__ = [
    "PATTERNS",
    "SA",
    "SWA",
    "Full",
    "MoBA",
    "Pattern",
    "make_pattern",
    "parse_pattern",
]
