"""Attention of one layer over every pattern and backend at one length."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from sa_patch.benchmark.attention.candidates import Candidate, gather
from sa_patch.benchmark.attention.correctness import Expected, expect, judge, merge
from sa_patch.benchmark.attention.options import AttentionOptions
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.clock import Call
from sa_patch.benchmark.measuring import Entry, Measuring
from sa_patch.benchmark.record import WRONG
from sa_patch.benchmark.time_plan import Seen
from sa_patch.kernels import choose_backend
from sa_patch.patterns import Pattern

PROBE = 1024  # tokens of the calls from which a first long length is predicted
PROBED_FROM = 4096
CHECK_LAYER = 0
Inputs = tuple[Tensor, Tensor, Tensor]


class AttentionMeasurer:
    """Measures a layer; every call has a layer of its own, so that nothing is drawn before."""

    def __init__(
        self, options: AttentionOptions, bench: AttentionBench, measuring: Measuring
    ) -> None:
        self.options, self.bench, self.measuring = options, bench, measuring
        self.clock = measuring.clock
        self._layers: dict[str, Iterator[int]] = {}

    def measure(self, n: int, share: float) -> None:
        """Check and time everything at length n within `share` of the time left."""
        if n >= PROBED_FROM:
            # Learn what each takes on a short sequence, before a long one is risked.
            known = self.measuring.history.seen
            if unknown := [entry for entry in self._entries(PROBE)[1] if entry.key not in known]:
                self.measuring.measure(PROBE, unknown, share=0, least_share=1)
        cells, entries = self._entries(n)
        self.bench.cells += cells
        self.measuring.measure(n, entries, share, free_bytes=self.clock.free_bytes())

    def _entries(self, n: int) -> tuple[list[AttentionCell], list[Entry]]:
        inputs = self._inputs(n)
        contestants, refused = gather(self.options.patterns(), self.options.backends, *inputs[:2])
        self.bench.not_served += [one for one in refused if one not in self.bench.not_served]
        oracle: dict[Pattern, list[Expected]] = {}
        cells = [self._cell(one, n, inputs) for one in contestants]
        entries = []
        for one, cell in zip(contestants, cells, strict=True):
            check = partial(self._check, one, cell, inputs, oracle)
            entries.append(Entry(one, cell, check, partial(self._milliseconds, one, inputs)))
        return cells, entries

    def _call(self, one: Candidate, inputs: Inputs, layer: int | None = None) -> Call:
        """A call to be measured, in a layer that no call had before unless one is given."""
        if layer is None:
            layer = next(self._layers.setdefault(one.key, itertools.count(CHECK_LAYER + 1)))
        return partial(one.call, *inputs, layer)

    def _milliseconds(self, one: Candidate, inputs: Inputs) -> float:
        return self.clock.milliseconds(self._call(one, inputs))

    def _inputs(self, n: int) -> Inputs:
        options = self.options
        generator = torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + n)

        def normal(heads: int) -> Tensor:
            size = (options.batch, heads, n, options.head_dim)
            drawn = torch.randn(size, generator=generator, device=options.device)
            return drawn.to(options.torch_dtype)

        return normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)

    def _cell(self, one: Candidate, n: int, inputs: Inputs) -> AttentionCell:
        options, (q, k, v) = self.options, inputs
        per_row = 2.0 * options.head_dim * options.heads
        return AttentionCell(
            n=n,
            label=one.label,
            method=one.shown.name,
            backend=one.backend,
            rival=one.rival,
            window=one.shown.effective_window,
            automatic=not one.rival and choose_backend(one.shown, q, k).name == one.backend,
            mean_keys=float(one.shown.keys_per_query(n).mean()),
            flops=per_row * options.batch * one.needed_work(n),
            io_bytes=sum(t.numel() * t.element_size() for t in (q, k, v, q)),
        )

    def _check(
        self,
        one: Candidate,
        cell: AttentionCell,
        inputs: Inputs,
        oracle: dict[Pattern, list[Expected]],
    ) -> Seen | None:
        """Compare with the oracle and learn memory and time."""
        history = self.measuring.history
        if one.shown not in oracle:
            oracle[one.shown] = self._expected(one.shown, inputs)
        if one.key not in history.seen:
            # Compilation is neither time nor memory of the call.
            self._call(one, inputs)()
        started = time.perf_counter()
        out, extra = self.clock.memory(self._call(one, inputs, CHECK_LAYER))
        ms = 1e3 * (time.perf_counter() - started)
        verdict = merge([judge(out, each) for each in oracle[one.shown]])
        del out
        if history.quick(one, cell.n):
            ms = self._milliseconds(one, inputs)
        cell.extra_bytes, cell.correctness = extra, verdict
        if not verdict.passed:
            cell.status, cell.reason = WRONG, verdict.reason
            return None
        return Seen(cell.n, ms, extra)

    def _expected(self, shown: Pattern, inputs: Inputs) -> list[Expected]:
        """The oracle's rows for the first and the last sequence of the batch."""
        rows = sorted({0, self.options.batch - 1})
        seed = self.options.seed
        return [expect(shown, *inputs, layer=CHECK_LAYER, row=row, seed=seed) for row in rows]
