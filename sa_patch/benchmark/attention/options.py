"""What a benchmark of attention is asked to do, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_patch.benchmark.lists import read_size, read_sizes, split_names
from sa_patch.errors import UserError, suggest
from sa_patch.kernels import BACKENDS
from sa_patch.patterns import PATTERNS, Pattern, make_pattern, parse_pattern
from sa_patch.patterns.registry import parameters

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_METHODS = ("sa", "swa", "moba", "full")
_COMMON: dict[str, Any] = {
    "window": (256,),
    "methods": DEFAULT_METHODS,
    "batch": 1,
    "threads": None,
    "out": Path("runs/bench"),
    "seed": 0,
}
# Qwen3-8B's attention on a GPU; a small model's on a CPU, where the largest must end in minutes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": _COMMON
    | {
        "n": (1024, 2048, 4096, 8192, 16384),
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "dtype": "float32",
        "repeats": 15,
        "budget": 270.0,
    },
    "cuda": _COMMON
    | {
        "n": (2048, 4096, 8192, 16384, 32768, 65536, 131072),
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "repeats": 30,
        "budget": 270.0,
    },
}
"""Name, placeholder and help of every option that `make_options` takes, all as text."""


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark run; `make_options` fills in the defaults of a device.

    Args:
        n: lengths of the sequences, ascending; every row of the batch has that many real tokens.
        heads, kv_heads, head_dim, batch: shape of q ``[batch, heads, n, head_dim]`` and of k, v.
        window: windows for the methods that do not name one themselves.
        methods: names or text forms of patterns.
        backends: names in `BACKENDS`.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        threads: torch threads; None leaves them as they are.
        repeats: most timed repetitions of a cell.
        budget: seconds for the whole run.
        out: folder of the results, made if it is missing.
        seed: of inputs, sampled queries and the order of calls.

    Raises:
        UserError: for a value that is not allowed, or a device that is not there.
    """

    n: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: tuple[int, ...]
    methods: tuple[str, ...]
    backends: tuple[str, ...]
    dtype: str
    device: str
    threads: int | None
    batch: int
    repeats: int
    budget: float
    out: Path
    seed: int

    def __post_init__(self) -> None:
        for field in ("heads", "kv_heads", "head_dim", "batch", "repeats"):
            _at_least_one(getattr(self, field), field)
        if self.threads is not None:
            _at_least_one(self.threads, "threads")
        for field in ("n", "window"):
            values = getattr(self, field)
            if not values:
                raise UserError(f"{field} must name at least one number")
            for value in values:
                _at_least_one(value, field)
        object.__setattr__(self, "n", tuple(sorted(set(self.n))))
        if self.heads % self.kv_heads:
            raise UserError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if not 0 < self.budget < float("inf"):
            raise UserError(f"budget must be a positive number of seconds, got {self.budget}")
        _known(self.dtype, list(DTYPES), "dtype")
        _known(self.device, ["cpu", "cuda"], "device")
        for name in self.backends:
            _known(name, list(BACKENDS), "backend")
        if not self.backends or not self.methods:
            raise UserError("name at least one backend and one method")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch sees no CUDA device here; use --device cpu")
        self.patterns()

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

    def described(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def make_options(**given: Any) -> BenchOptions:
    """Options from typed values or their text forms; those that are None or missing get defaults.

    Raises:
        UserError: for a text that does not spell a value, or a value that is not allowed.
    """
    named = {key: value for key, value in given.items() if value is not None}
    device = named.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    _known(device, list(DEFAULTS), "device")
    values = DEFAULTS[device] | {"backends": tuple(BACKENDS), "device": device} | named
    for field in ("n", "window"):
        values[field] = read_sizes(values[field], field)
    for field in ("heads", "kv_heads", "head_dim", "batch", "repeats", "threads", "seed"):
        if isinstance(values[field], str):
            values[field] = read_size(values[field], field)
    values["methods"] = split_names(values["methods"])
    values["backends"] = split_names(values["backends"])
    values["dtype"] = SHORT_DTYPES.get(values["dtype"], values["dtype"])
    values["out"] = Path(values["out"])
    try:
        values["budget"] = float(values["budget"])
    except ValueError as error:
        raise UserError(f"budget must be a number of seconds, got {values['budget']!r}") from error
    return BenchOptions(**values)


def prepare_folder(out: Path) -> None:
    """Make the folder of the results.

    Raises:
        UserError: if it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write into {out}; choose another folder with --out")


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


def _at_least_one(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{field} must be a whole number of at least 1, got {value!r}")


def _known(word: str, known: list[str], what: str) -> None:
    if word not in known:
        raise UserError(
            f"unknown {what} {word!r}{suggest(str(word), known)} known: {', '.join(known)}"
        )
