"""What a search chooses from: families of patterns, and the named methods among them.

A family is a text form with ``{}`` for the number that fills the budget (see `Costs.fit`), so that
no candidate wins by spending more, and none loses by spending less than it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

SINKS = (0, 4, 16)
# Of the budget, what goes to the window and to the dense tail.
PARTS = (0.0, 0.125, 0.25, 0.5)
CHOSEN_BLOCKS = (16, 32, 64, 128)
# Queries that share their choices, and the tokens of a segment that they see besides.
SHARED, SEGMENTS = (16, 32, 64), (32, 64, 128)

# By core: the text form with {} and {block}, and the sizes of its blocks.
CORES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "swa": ("swa:{{}}", ()),
    "sa": ("sa:{{}}", ()),
    "psa": ("psa:{{}}", ()),
    "moba": ("moba:{block},{{}}", (8, 16, 32, 64)),
    "shared_moba": ("moba:{block},{{}},shared={shared},grouped=true", (8, 16, 32)),
    "block_topk": ("block_topk:{block},{{}},{sinks},{local},branch={branch}", (4, 8, 16)),
    "shared_block_topk": (
        "block_topk:{block},{{}},{block},branch=0,shared={shared},segment={segment}",
        (8, 16),
    ),
    "shared_threshold": (
        "block_topk:{block},16,{block},branch=0,shared={shared},segment={segment},threshold={{}}",
        (8, 16),
    ),
    "power": ("power:{{}},{block}", (1, 16)),
    "vertical_slash": ("vertical_slash:{{}},{{}}", ()),
    "xattention": ("xattention:{block},{{}},stride=16", CHOSEN_BLOCKS),
    "permuted_blocks": ("permuted_blocks:{block},{{}}", CHOSEN_BLOCKS),
    "flashprefill": ("flashprefill:{{}},{block},local=2,last=1", (16, 32, 64)),
}
# Cores that show a neighbourhood, or first tokens, by themselves.
_SEGMENTED = ("shared_block_topk", "shared_threshold")
_OWN_WINDOW = (*_SEGMENTED, "swa", "block_topk", "power", "vertical_slash", "flashprefill")
_OWN_SINKS = (*_SEGMENTED, "block_topk", "flashprefill")

_PLAIN = {"tail": 0.0, "sinks": 0, "window": 0.0}
_OWN_CHOICES = {"sinks": 4, "block_topk_block": 4, "near": 4, "branch": 4}
_SHARED_CHOICES = {"shared_block_topk_block": 16, "shared": 32}
NAMED: Mapping[str, Mapping[str, Any]] = {
    "sinks and sliding window": _PLAIN | {"core": "swa", "sinks": 4},
    "SA": _PLAIN | {"core": "sa"},
    "sinks and MoBA": _PLAIN | {"core": "moba", "sinks": 4, "moba_block": 16},
    "sinks and MoBA, shared": _PLAIN
    | {"core": "shared_moba", "sinks": 4, "shared_moba_block": 16, "shared": 32},
    "block_topk": _PLAIN | {"core": "block_topk"} | _OWN_CHOICES,
    "block_topk, tail": _PLAIN | {"core": "block_topk"} | _OWN_CHOICES | {"tail": 0.25},
    "block_topk, shared": _PLAIN | {"core": "shared_block_topk", "segment": 32} | _SHARED_CHOICES,
    "block_topk, shared, tail": _PLAIN
    | {"core": "shared_block_topk", "segment": 64, "tail": 0.125}
    | _SHARED_CHOICES,
    "block_topk, shared, threshold, tail": _PLAIN
    | {"core": "shared_threshold", "shared_threshold_block": 16, "shared": 32}
    | {"segment": 32, "tail": 0.125},
    "vertical_slash": _PLAIN | {"core": "vertical_slash"},
    "xattention, small blocks": _PLAIN | {"core": "xattention", "xattention_block": 16},
    "permuted_blocks, small blocks": _PLAIN
    | {"core": "permuted_blocks", "permuted_blocks_block": 16},
    "flashprefill, small blocks": _PLAIN | {"core": "flashprefill", "flashprefill_block": 32},
}
"""The methods that a search starts with and must beat, as points of the space."""


class Chooser(Protocol):
    """What `propose` needs of a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def propose(trial: Chooser, keys: float) -> str:
    """The family that a trial stands for, such as ``tail:16+sinks:4+moba:16,{}``.

    Args:
        keys: of a query on average, that the budget allows where nothing is chosen.
    """
    core = trial.suggest_categorical("core", tuple(CORES))
    form, block_sizes = CORES[core]
    values: dict[str, Any] = {}
    parts = [("tail", round(keys * trial.suggest_categorical("tail", PARTS)))]
    if block_sizes:
        values["block"] = trial.suggest_categorical(f"{core}_block", block_sizes)
    if core == "block_topk":
        values["sinks"] = trial.suggest_categorical("sinks", SINKS)
        values["local"] = values["block"] * trial.suggest_categorical("near", (1, 2, 4, 8))
        values["branch"] = trial.suggest_categorical("branch", (0, 4))
    if core.startswith("shared_"):
        values["shared"] = trial.suggest_categorical("shared", SHARED)
    if core in _SEGMENTED:
        values["segment"] = trial.suggest_categorical("segment", SEGMENTS)
    if core not in _OWN_SINKS:
        parts.append(("sinks", trial.suggest_categorical("sinks", SINKS)))
    if core not in _OWN_WINDOW:
        parts.append(("swa", round(keys * trial.suggest_categorical("window", PARTS))))
    own = [f"{name}:{size}" for name, size in parts if size]
    return "+".join([*own, form.format(**values)])
