"""Patterns and backends, and which of them work on this machine: ``sa-patch methods``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sa_patch.kernels import BACKENDS, choose_backend
from sa_patch.patterns import PATTERNS, Pattern, make_pattern
from sa_patch.patterns.registry import NAMED, parameters


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention that is asked about: tokens, query and KV heads, width of a head."""

    n: int = 1024
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 128


def devices() -> list[torch.device]:
    """The CPU, and the GPU if torch sees one."""
    found = [torch.device("cpu")]
    return [*found, torch.device("cuda")] if torch.cuda.is_available() else found


def example(name: str, window: int) -> Pattern:
    """A pattern of this method at a given window."""
    takes_window = "window" in parameters(PATTERNS[name])
    return make_pattern(name, window=window if takes_window else None)


def inputs(shape: Shape) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(device, q, k) of this shape on every device, in the dtype that is usual there."""
    for device in devices():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = (1, shape.heads, shape.n, shape.head_dim)
        q = torch.empty(size, dtype=dtype, device=device)
        yield (
            device.type,
            q,
            torch.empty((1, shape.kv_heads, *size[2:]), dtype=dtype, device=device),
        )


def support(shape: Shape) -> Iterator[tuple[str, str, str, bool, str]]:
    """(method, backend, device, works, why not) for every combination."""
    for device, q, k in inputs(shape):
        for name in PATTERNS:
            for backend in BACKENDS.values():
                works, reason = backend.supports(example(name, shape.window), q, k)
                yield name, backend.name, device, works, reason


def automatic(name: str, shape: Shape) -> str:
    """What ``backend="auto"`` takes for a method, on every device."""
    choices = [
        f"{choose_backend(example(name, shape.window), q, k).name} ({device})"
        for device, q, k in inputs(shape)
    ]
    return ", ".join(choices)


NOT_FAST = (
    "not fast on a GPU: small blocks that every query chooses for itself (block_topk and moba with "
    "shared=1): a tile of queries then reads most keys; it reads few with shared=32, as in "
    "shared_topk, whose speed was not measured"
)


def print_methods(shape: Shape, console: Console) -> None:
    """List the methods with their parameters, the backends, and what works where."""
    methods = Table(title="methods", title_justify="left")
    for column in ("name", "parameters", "a query sees", "keys of the last query", "auto takes"):
        methods.add_column(column)
    for name, cls in PATTERNS.items():
        pattern = example(name, shape.window)
        keys = float(pattern.keys_per_query(shape.n)[-1])
        methods.add_row(
            name,
            ", ".join(parameters(cls)) or "-",
            cls.summary,
            f"{keys:.0f}" + (" at most" if pattern.keys_are_bounds else ""),
            automatic(name, shape),
        )
    backends = Table(title="backends", title_justify="left")
    for column in ("name", "what it is", "works here", "and not"):
        backends.add_column(column)
    answers = list(support(shape))
    for backend in BACKENDS.values():
        own = [answer for answer in answers if answer[1] == backend.name]
        able = _by_reason((device, "", method) for method, _, device, works, _ in own if works)
        unable = _by_reason(
            (device, reason, method) for method, _, device, works, reason in own if not works
        )
        backends.add_row(backend.name, backend.summary, able, unable)
    console.print(methods)
    for name, text in NAMED.items():
        console.print(f"{name} stands for {text}", highlight=False)
    console.print(NOT_FAST, highlight=False)
    console.print(backends)
    console.print(
        f"asked for n = {shape.n}, {shape.heads} query and {shape.kv_heads} KV heads of "
        f"{shape.head_dim}, window {shape.window}; other sizes: see --help",
        style="dim",
        highlight=False,
    )


def _by_reason(answers: Iterable[tuple[str, str, str]]) -> str:
    """Lines for (device, reason, method), with the methods of one device and reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for device, reason, method in answers:
        groups.setdefault((device, reason), []).append(method)
    lines = [
        f"{', '.join(methods)} ({device})" + (f": {reason}" if reason else "")
        for (device, reason), methods in groups.items()
    ]
    return "\n".join(lines) or "-"
