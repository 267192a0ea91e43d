"""One length of a benchmark: check every contestant, then time them in turn."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa_patch.benchmark.attention.candidates import Candidate, Visibility, automatic, gather
from sa_patch.benchmark.attention.correctness import Expected, expect, judge, merge
from sa_patch.benchmark.attention.options import BenchOptions
from sa_patch.benchmark.attention.record import FAILED, OUT_OF_MEMORY, TIMED, WRONG, Bench, Cell
from sa_patch.benchmark.attention.time_plan import (
    MIN_REPEATS,
    SLOW_MS,
    History,
    Seen,
    needed_work,
    refuse,
    repetitions,
    spread,
)
from sa_patch.benchmark.clock import Call, Clock
from sa_patch.errors import one_line
from sa_patch.patterns import Pattern

PROBE = 1024  # tokens of the call from which a first long length is predicted
PROBED_FROM = 4096
CHECK_LAYER = 0
WORTH_A_LINE = 5.0  # seconds
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Runner:
    """What lasts from one length to the next.

    Args:
        deadline: time of `time.monotonic` at which the budget is spent.
        say: told one line at a time how far the run is.
    """

    options: BenchOptions
    bench: Bench
    clock: Clock
    deadline: float
    say: Callable[[str], None]
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        # Layer after layer for each: stochastic attention draws and plans anew, as in a model.
        self._layers: dict[str, Iterator[int]] = {}
        self._random = random.Random(self.options.seed)
        self.began = time.monotonic()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, n: int, share: float) -> None:
        """Check and time everything at length n within `share` of the time left.

        Cells are in the record as soon as they are known, so that an interrupt keeps them.
        """
        inputs = self._inputs(n)
        contestants, refused = gather(
            self.options.patterns(), self.options.backends, inputs[0], inputs[1]
        )
        for absent in refused:
            if absent not in self.bench.not_served:
                self.bench.not_served.append(absent)
        if n >= PROBED_FROM:
            self._probe(contestants)
        reasons = refuse(
            contestants,
            self.history,
            n,
            seconds=self.left() * share,
            free_bytes=self.clock.free_bytes(),
        )
        cells: dict[str, Cell] = {}
        for one in contestants:
            cell = self._cell(one, n, inputs)
            cell.reason = reasons.get(one.key, "interrupted before it was timed often enough")
            cells[one.key] = cell
            self.bench.cells.append(cell)
        ready: dict[str, Candidate] = {}
        expected: dict[Visibility, list[Expected]] = {}
        self.say(f"n = {n}: checking {len(contestants) - len(reasons)} contestants")
        for one in contestants:
            if one.key in reasons:
                continue
            started = time.monotonic()
            if self._check(one, cells[one.key], inputs, expected):
                ready[one.key] = one
            if (seconds := time.monotonic() - started) > WORTH_A_LINE:
                self.say(f"  {one.label} on {one.backend}: check and compilation {seconds:.0f} s")
        self._time(n, ready, cells, inputs, share)

    def _call(self, one: Candidate, inputs: Inputs, layer: int | None = None) -> Call:
        """A call to be measured, in a layer that no call had before unless one is given."""
        chosen = self._next_layer(one) if layer is None else layer
        return lambda: one.call(*inputs, chosen)

    def _next_layer(self, one: Candidate) -> int:
        return next(self._layers.setdefault(one.key, itertools.count(CHECK_LAYER + 1)))

    def _inputs(self, n: int) -> Inputs:
        options = self.options
        generator = torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + n)

        def normal(heads: int) -> Tensor:
            size = (options.batch, heads, n, options.head_dim)
            drawn = torch.randn(size, generator=generator, device=options.device)
            return drawn.to(options.torch_dtype)

        return normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)

    def _cell(self, one: Candidate, n: int, inputs: Inputs) -> Cell:
        options, (q, k, v) = self.options, inputs
        pattern = one.shown if isinstance(one.shown, Pattern) else None
        window = pattern.effective_window if pattern else getattr(one.shown, "window", None)
        chosen = not one.rival and pattern is not None and automatic(pattern, q, k) == one.backend
        per_row = 2.0 * options.head_dim * options.heads
        return Cell(
            n=n,
            label=one.label,
            method=one.method,
            backend=one.backend,
            rival=one.rival,
            window=window,
            automatic=chosen,
            mean_keys=float(one.shown.keys_per_query(n).mean()),
            flops=per_row * options.batch * needed_work(one, n),
            io_bytes=sum(t.numel() * t.element_size() for t in (q, k, v, q)),
        )

    def _probe(self, contestants: list[Candidate]) -> None:
        """Learn what each contestant takes on a short sequence, before a long one is risked."""
        unknown = [one for one in contestants if one.key not in self.history.seen]
        if not unknown:
            return
        self.say(f"trying {len(unknown)} contestants at {PROBE} tokens")
        q, k, v = inputs = self._inputs(PROBE)
        for one in unknown:
            try:
                one.call(q, k, v, self._next_layer(one))
                extra = self.clock.memory(self._call(one, inputs))[1]
                ms = self.clock.milliseconds(self._call(one, inputs))
            except Exception:  # the check at the length that was asked for records the reason
                continue
            self.history.keep(one, Seen(PROBE, ms, extra))

    def _check(
        self,
        one: Candidate,
        cell: Cell,
        inputs: Inputs,
        expected: dict[Visibility, list[Expected]],
    ) -> bool:
        """Compare with the oracle and learn memory and time; False where no time may be given."""
        predicted = self.history.milliseconds(one, cell.n)
        try:
            if one.shown not in expected:
                expected[one.shown] = self._oracle(one.shown, inputs)
            if predicted is None:
                # Compilation is neither time nor memory of the call.
                self._call(one, inputs)()
            started = time.perf_counter()
            out, extra = self.clock.memory(self._call(one, inputs, CHECK_LAYER))
            ms = 1e3 * (time.perf_counter() - started)
            verdict = merge([judge(out, each) for each in expected[one.shown]])
            del out
            if predicted is None or predicted < SLOW_MS:
                ms = self.clock.milliseconds(self._call(one, inputs))
        except Exception as error:
            _give_up(cell, error)
            self.clock.forget()
            return False
        cell.extra_bytes = extra
        cell.gate_error = verdict.error if math.isfinite(verdict.error) else None
        cell.gate_tolerance = verdict.tolerance
        cell.gate_rows, cell.gate_undecided = verdict.compared, verdict.undecided
        if not verdict.passed:
            cell.status, cell.reason = WRONG, verdict.reason
            return False
        self.history.keep(one, Seen(cell.n, ms, extra))
        return True

    def _oracle(self, shown: Visibility, inputs: Inputs) -> list[Expected]:
        """The first and the last row of the batch."""
        rows = sorted({0, self.options.batch - 1})
        seed = self.options.seed
        return [expect(shown, *inputs, layer=CHECK_LAYER, row=row, seed=seed) for row in rows]

    def _time(
        self,
        n: int,
        ready: dict[str, Candidate],
        cells: dict[str, Cell],
        inputs: Inputs,
        share: float,
    ) -> None:
        """Call the cells in turn, each round in a new order, so that a drift hits all alike."""
        counts = repetitions(
            {key: self.history.seen[key].ms for key in ready},
            seconds=max(0.0, self.left() * share),
            most=self.options.repeats,
        )
        rounds = max(counts.values(), default=0)
        takes_part = {key: spread(count, rounds) for key, count in counts.items()}
        self.say(f"n = {n}: timing {len(ready)} contestants, up to {rounds} times each")
        order = list(ready)
        for turn in range(rounds):
            self._random.shuffle(order)
            for key in order:
                late = cells[key].status == TIMED and self.left() < 0
                if key in ready and turn in takes_part[key] and not late:
                    self._sample(ready, key, cells[key], inputs)
        for key, one in ready.items():
            # The one call after the check may have been unlucky; predictions rest on the median.
            cell = cells[key]
            if cell.median_ms is not None:
                self.history.keep(one, Seen(n, cell.median_ms, cell.extra_bytes or 0))
        self.clock.forget()

    def _sample(self, ready: dict[str, Candidate], key: str, cell: Cell, inputs: Inputs) -> None:
        """Time one call; a contestant that fails now is given up."""
        began = time.monotonic() - self.began
        try:
            ms = self.clock.milliseconds(self._call(ready[key], inputs))
        except Exception as error:
            _give_up(cell, error)
            cell.samples_ms.clear()
            cell.started_s.clear()
            del ready[key]
            return
        cell.samples_ms.append(ms)
        cell.started_s.append(round(began, 4))
        if len(cell.samples_ms) >= min(MIN_REPEATS, self.options.repeats):
            cell.status, cell.reason = TIMED, ""


def _give_up(cell: Cell, error: Exception) -> None:
    text = str(error).lower()
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    memory = memory or "allocate memory" in text or "out of memory" in text
    cell.status = OUT_OF_MEMORY if memory else FAILED
    cell.reason = one_line(error)
