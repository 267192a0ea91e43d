"""Attention of one layer over every pattern and backend at one length."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from sa_patch.benchmark.attention.candidates import Candidate, gather
from sa_patch.benchmark.attention.correctness import Expected, expect, judge, merge
from sa_patch.benchmark.attention.options import AttentionOptions
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.clock import Call, Clock
from sa_patch.benchmark.measuring import Measurer
from sa_patch.benchmark.record import WRONG
from sa_patch.benchmark.tables import Say
from sa_patch.benchmark.time_plan import Seen
from sa_patch.kernels import choose_backend, expect_layers, forget_plans
from sa_patch.patterns import Pattern, seed_of
from sa_patch.patterns.permutation import forget_permutations

PROBE = 1024  # tokens of the calls from which a first long length is predicted
PROBED_FROM = 4096
CHECK_LAYER = 0
# Of the model whose layer is measured, for what is planned for all of them at once: Qwen3-8B's.
LAYERS = 36
PLANS_TOGETHER = ("triton",)
# Of the time left, what a cell's planning may take to be timed.
PLANNING_SHARE = 0.05
Inputs = tuple[Tensor, Tensor, Tensor]


class AttentionMeasurer(Measurer[Candidate, AttentionCell]):
    """Measures a layer; every call has a layer of its own, so that nothing is drawn before."""

    def __init__(
        self,
        options: AttentionOptions,
        bench: AttentionBench,
        clock: Clock,
        deadline: float,
        say: Say,
    ) -> None:
        earlier = [number for cell in bench.cells for number in cell.passes]
        number = max(earlier, default=-1) + 1
        super().__init__(clock, deadline, options.repeats, say, seed=options.seed, number=number)
        self.options, self.bench = options, bench
        self._layers: dict[str, Iterator[int]] = {}
        # Contestants whose planning is timed apart.
        self._planned: set[str] = set()
        expect_layers(LAYERS)

    def measure(self, n: int, share: float) -> None:
        """Check and time everything at length n within `share` of the time left.

        What the record holds at this length already is not measured again, save for the baseline,
        whose calls are paired with those of the same pass.
        """
        settled = {(cell.label, cell.backend) for cell in self.bench.where(n=n)}
        begun = self._begin(n)
        waiting = {one.key for one, c in begun if (c.label, c.backend) not in settled}
        if not waiting:
            return
        baseline = self.bench.baseline(n)
        if baseline is not None:
            waiting.add(begun[0][0].key)
        if n >= PROBED_FROM:
            # Learn what each takes on a short sequence, before a long one is risked.
            known = self.history.seen
            unknown = [
                pair
                for pair in self._begin(PROBE)
                if pair[0].key in waiting and pair[0].key not in known
            ]
            if unknown:
                self.check_and_time(PROBE, unknown, share=0, within_share=False)
        pairs = [pair for pair in self._begin(n) if pair[0].key in waiting]
        cells = [cell for _, cell in pairs]
        self.bench.cells += cells if baseline is None else cells[1:]
        try:
            self.check_and_time(n, pairs, share, free_bytes=self.clock.free_bytes())
        finally:
            if baseline is not None:
                baseline.extend(cells[0])

    def _begin(self, n: int) -> list[tuple[Candidate, AttentionCell]]:
        """Draw the inputs of a length; who takes part, with a cell for each."""
        self._inputs, self._oracle = self._draw(n), dict[Pattern, list[Expected]]()
        contestants, refused = gather(
            self.options.patterns(), self.options.backends, *self._inputs[:2]
        )
        self.bench.not_served += [one for one in refused if one not in self.bench.not_served]
        return [(one, self._cell(one, n)) for one in contestants]

    def _call(self, one: Candidate, layer: int | None = None) -> Call:
        """A call to be measured, in a layer that no call had before unless one is given.

        Permutations that another backend drew for this layer are forgotten.
        """
        forget_permutations()
        if layer is None:
            layer = next(self._layers.setdefault(one.key, itertools.count(CHECK_LAYER + 1)))
        return partial(one.call, *self._inputs, layer)

    def milliseconds(self, one: Candidate) -> float:
        if one.key not in self._planned:
            return self.clock.milliseconds(self._call(one))
        # Its plan may have made room for those of others.
        self._call(one, CHECK_LAYER)()
        return self.clock.milliseconds(self._call(one, CHECK_LAYER))

    def _draw(self, n: int) -> Inputs:
        options = self.options
        generator = torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + n)

        def normal(heads: int) -> Tensor:
            size = (options.batch, heads, n, options.head_dim)
            drawn = torch.randn(size, generator=generator, device=options.device)
            return drawn.to(options.torch_dtype)

        return normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)

    def _cell(self, one: Candidate, n: int) -> AttentionCell:
        options, (q, k, v) = self.options, self._inputs
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

    def check(self, one: Candidate, cell: AttentionCell) -> Seen | None:
        """Compare with the oracle and learn memory and time."""
        if one.shown not in self._oracle:
            self._oracle[one.shown] = self._expected(one.shown)
        if one.key not in self.history.seen:
            # Compilation is neither time nor memory of the call.
            self._call(one)()
        started = time.perf_counter()
        out, extra = self.clock.memory(self._call(one, CHECK_LAYER))
        ms = 1e3 * (time.perf_counter() - started)
        verdict = merge([judge(out, each) for each in self._oracle[one.shown]])
        del out
        if self.history.quick(one, cell.n):
            ms = self.milliseconds(one)
        cell.extra_bytes, cell.correctness = extra, verdict
        self._planned.discard(one.key)
        if not verdict.passed:
            cell.status, cell.reason = WRONG, verdict.reason
            return None
        plans = one.backend in PLANS_TOGETHER and seed_of(one.shown) is not None
        if plans and 2 * LAYERS * ms < PLANNING_SHARE * 1e3 * self.left():
            cell.plan_ms = self._plan_ms(one)
            self._planned.add(one.key)
        return Seen(cell.n, ms, extra)

    def _plan_ms(self, one: Candidate) -> float:
        """What the first pass through all layers of a model takes more than as many calls in one
        layer, for each of them."""

        def calls(layers: Iterable[int]) -> Tensor:
            for layer in layers:
                out = self._call(one, layer)()
            return out

        forget_plans()
        first = self.clock.milliseconds(partial(calls, range(LAYERS)))
        self._call(one, CHECK_LAYER)()
        kept = self.clock.milliseconds(partial(calls, itertools.repeat(CHECK_LAYER, LAYERS)))
        return max(0.0, first - kept) / LAYERS

    def _expected(self, shown: Pattern) -> list[Expected]:
        """The oracle's rows for the first and the last sequence of the batch."""
        rows = sorted({0, self.options.batch - 1})
        expected = partial(expect, shown, *self._inputs, layer=CHECK_LAYER)
        return [expected(row=row, seed=self.options.seed) for row in rows]
