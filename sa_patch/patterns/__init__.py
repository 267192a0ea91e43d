"""WHICH keys may a query see: index mathematics, one file per pattern."""

from sa_patch.patterns.base import Pattern
from sa_patch.patterns.block_topk import BlockTopK
from sa_patch.patterns.budget import fit_budget, flops_share, split_budget
from sa_patch.patterns.full import Full
from sa_patch.patterns.moba import MoBA
from sa_patch.patterns.prefix_stable import PSA
from sa_patch.patterns.registry import PATTERNS, RIVALS, make_pattern, parse_pattern
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.rivals.flashprefill import FlashPrefill
from sa_patch.patterns.rivals.flexprefill import FlexPrefill
from sa_patch.patterns.rivals.permuted_blocks import PermutedBlocks
from sa_patch.patterns.rivals.power import Power
from sa_patch.patterns.rivals.prism import Prism
from sa_patch.patterns.rivals.skip_softmax import SkipSoftmax
from sa_patch.patterns.rivals.sparge import Sparge
from sa_patch.patterns.rivals.vertical_slash import VerticalSlash
from sa_patch.patterns.rivals.xattention import XAttention
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.sliding_window import SWA
from sa_patch.patterns.stochastic import SA
from sa_patch.patterns.tail import Tail
from sa_patch.patterns.union import Union, parts_of, seed_of, split_tail, unite, with_seed

__all__ = [
    "PATTERNS",
    "PSA",
    "RIVALS",
    "SA",
    "SWA",
    "BlockTopK",
    "FlexPrefill",
    "ByHead",
    "FlashPrefill",
    "PermutedBlocks",
    "Prism",
    "Sparge",
    "Full",
    "MoBA",
    "Pattern",
    "Power",
    "Sinks",
    "SkipSoftmax",
    "Tail",
    "Union",
    "VerticalSlash",
    "XAttention",
    "fit_budget",
    "flops_share",
    "make_pattern",
    "parse_pattern",
    "parts_of",
    "seed_of",
    "split_budget",
    "split_tail",
    "unite",
    "with_seed",
]
