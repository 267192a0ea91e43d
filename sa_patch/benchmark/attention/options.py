"""What a benchmark of attention is asked to do, checked before anything slow begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.arguments import read_size, read_sizes, split_names
from sa_patch.benchmark.options import (
    DTYPES,
    Options,
    at_least_one,
    check_heads,
    choose_device,
)
from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS
from sa_patch.patterns import PATTERNS, Pattern, make_pattern, parse_pattern
from sa_patch.patterns.budget import require_known_keys
from sa_patch.patterns.registry import parameters

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NUMBERS = ("heads", "kv_heads", "head_dim", "batch", "repeats")
_COMMON: dict[str, Any] = dict(
    window=(256,),
    methods=("sa", "swa", "moba", "full"),
    batch=1,
    threads=None,
    budget=270.0,
    out=Path("runs/bench"),
    seed=0,
)
# Qwen3-8B's attention on a GPU; a small model's on a CPU, where the largest must end in minutes.
_CPU = dict(heads=8, kv_heads=2, head_dim=64, dtype="float32", repeats=15)
_CUDA = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", repeats=30)
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": _CPU | {"n": (1024, 2048, 4096, 8192, 16384)},
    "cuda": _CUDA | {"n": (2048, 4096, 8192, 16384, 32768, 65536, 131072)},
}


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """One benchmark run; `make_options` fills in the defaults of a device.

    Args:
        n: lengths of the sequences; every row of the batch has that many real tokens.
        heads, kv_heads, head_dim, batch: shape of q ``[batch, heads, n, head_dim]`` and of k, v.
        window: windows for the methods that do not name one themselves.
        methods: names or text forms of patterns.
        repeats: most timed repetitions of a cell.
        seed: of inputs, sampled queries and the order of calls.
        order: the lengths in the order in which they are measured, by default ascending.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: tuple[int, ...]
    methods: tuple[str, ...]
    batch: int
    repeats: int
    seed: int
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in (*NUMBERS, "window"):
            at_least_one(getattr(self, field), field)
        check_heads(self.heads, self.kv_heads, self.head_dim)
        if not self.methods:
            raise UserError("name at least one method")
        # FLOPs per second are told of known FLOPs alone.
        for pattern in self.patterns():
            require_known_keys(pattern)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def patterns(self) -> list[Pattern]:
        """The patterns to measure, each once: a method without a window takes every `window`.

        Raises:
            UserError: for a method that is unknown or misspelt.
        """
        found = [pattern for text in self.methods for pattern in _spelt_out(text, self.window)]
        return list(dict.fromkeys(found))


def make_options(**given: Any) -> AttentionOptions:
    """Options from typed values or their text forms; those that are None or missing get defaults.

    Raises:
        UserError: for a text that does not spell a value, or a value that is not allowed.
    """
    named = {key: value for key, value in given.items() if value is not None}
    device = choose_device(named.get("device"))
    values = _COMMON | DEFAULTS[device] | {"backends": tuple(BACKENDS)} | named | {"device": device}
    for field in ("n", "window"):
        values[field] = read_sizes(values[field], field)
    for field in (*NUMBERS, "threads", "seed"):
        if isinstance(values[field], str):
            values[field] = read_size(values[field], field)
    for field in ("methods", "backends"):
        values[field] = split_names(values[field])
    values["dtype"] = SHORT_DTYPES.get(values["dtype"], values["dtype"])
    values["out"] = Path(values["out"])
    try:
        values["budget"] = float(values["budget"])
    except ValueError as error:
        raise UserError(f"budget must be a number of seconds, got {values['budget']!r}") from error
    return AttentionOptions(**values)


def _spelt_out(text: str, windows: Sequence[int]) -> list[Pattern]:
    name, _, rest = text.strip().partition(":")
    cls = PATTERNS.get(name)
    takes_window = cls is not None and "window" in parameters(cls)
    if takes_window and not rest:
        return [make_pattern(name, window=window) for window in windows]
    # A leading value without a name is the window, or what stands in its place: sa:256.
    unnamed = "=" not in re.split("[,;]", rest)[0]
    if not takes_window or unnamed or "window=" in rest or "block_size=" in rest:
        return [parse_pattern(text)]
    return [parse_pattern(f"{text},window={window}") for window in windows]
