"""Times every setup of a model at every length, within a time limit."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sa_patch.benchmark.clock import Clock
from sa_patch.benchmark.prefill.parts import CORE, time_parts
from sa_patch.benchmark.prefill.record import FAILED, OUT_OF_MEMORY, TIMED, Prefill
from sa_patch.benchmark.prefill.setups import Setup, applied
from sa_patch.errors import one_line
from sa_patch.kernels import forget_plans
from sa_patch.kernels.counting import counting_backends
from sa_patch.patterns import SA

MIN_ROUNDS, MAX_ROUNDS = 2, 10
QUICK = 2.0  # seconds below which a first pass, which warms up, is not looked at
DRAWS = 20
LAYERS = 16


@dataclass
class Measurer:
    """Measures one model.

    Args:
        deadline: of `time.monotonic`; what cannot be done before it is skipped, with the reason.
        decoded: tokens to write after the prompt, stock and with the first sparse setup.
        longest: tokens of prompt and text together that the model was made for, beyond which
            none are written; None for any number.
        say: takes a line of progress.
        keep: is called whenever there is something new to put on disk.
    """

    model: PreTrainedModel
    name: str
    setups: Sequence[Setup]
    deadline: float
    decoded: int
    longest: int | None
    say: Callable[[str], None]
    keep: Callable[[], None]
    clock: Clock = field(init=False)
    _last: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """Tokens, seconds and the share of attention in them, of the last length of each setup."""
    _owed: float = 0.0

    def __post_init__(self) -> None:
        self.clock = Clock(self.model.device.type)

    @torch.inference_mode()
    def measure(self, n: int, share: float, prefills: list[Prefill]) -> None:
        """Measure all setups at length n into `prefills`.

        Args:
            share: of the time that is left, what this length may take for more than the fewest
                rounds; these are refused only where they do not fit before the deadline.
        """
        until = time.monotonic() + share * (self.deadline - time.monotonic())
        tokens = self._prompt(n)
        cells = [Prefill(self.name, n, s.label, s.backend, s.full) for s in self.setups]
        prefills += cells
        pairs = list(zip(self.setups, cells, strict=True))
        self._owed = 0.0
        running = [pair for pair in pairs if self._look(*pair, tokens)]
        self._race(running, tokens, until)
        for setup, cell in running:
            if cell.seconds:
                cell.status = TIMED
                share = cell.parts[CORE] / sum(cell.parts.values())
                self._last[setup.key] = (n, min(cell.seconds), share)
        self._decode(running, tokens)
        self.clock.forget()
        self.keep()

    def _look(self, setup: Setup, cell: Prefill, tokens: Tensor) -> bool:
        """One pass for memory and one for parts and counts; whether the setup can be timed."""
        expected = self._expected(setup, cell.n)
        left = self.deadline - time.monotonic() - self._owed
        if left <= 0 or (1 + MIN_ROUNDS) * expected > left:
            cell.reason = (
                f"a pass would take about {expected:.1f} s: {1 + MIN_ROUNDS} of them do not fit "
                "into the time budget"
                if left > 0
                else "the time budget was spent before"
            )
            return False
        try:
            with applied(self.model, setup):
                if expected < QUICK:
                    self._pass(tokens)
                self._peak(cell, tokens)
            if isinstance(setup.pattern, SA):
                cell.draw_seconds = self._draw_seconds(setup.pattern, cell.n)
            # Its rounds come later, and must not find the time given to others.
            self._owed += MIN_ROUNDS * sum(cell.parts.values())
            return True
        except Exception as error:
            self._gone(cell, error)
            return False

    def _peak(self, cell: Prefill, tokens: Tensor) -> None:
        def look() -> Tensor:
            with counting_backends() as calls:
                cell.parts = time_parts(self.model, lambda: self._pass(tokens))
            cell.calls = dict(calls)
            return torch.empty(0)

        if self.model.device.type == "cuda":
            _, cell.peak_bytes = self.clock.memory(look)
        else:
            # The profiler that counts bytes on a CPU slows small operations: no time is taken then.
            look()
            forget_plans()  # what is given back inside would be counted against it
            _, cell.peak_bytes = self.clock.memory(lambda: self._pass(tokens))

    def _race(self, running: Sequence[tuple[Setup, Prefill]], tokens: Tensor, until: float) -> None:
        """Rounds in random order, so that a drift of the machine hits all alike."""
        shuffled = random.Random(0)
        for number in range(MAX_ROUNDS):
            alive = [pair for pair in running if pair[1].status not in (OUT_OF_MEMORY, FAILED)]
            taken = sum(min(cell.seconds, default=0.0) for _, cell in alive)
            if number >= MIN_ROUNDS and time.monotonic() + taken > until:
                break
            shuffled.shuffle(alive)
            for setup, cell in alive:
                try:
                    with applied(self.model, setup):
                        cell.seconds.append(self._seconds(tokens))
                except Exception as error:
                    self._gone(cell, error)

    def _decode(self, running: Sequence[tuple[Setup, Prefill]], tokens: Tensor) -> None:
        count = self.decoded
        if self.longest is not None:
            count = min(count, self.longest - tokens.shape[1])
        chosen = [pair for pair in running if pair[0].pattern is None]
        chosen += [pair for pair in running if not pair[0].full][:1]
        for setup, cell in chosen if count else ():
            if self.deadline < time.monotonic() or cell.status != TIMED:
                continue
            try:
                with applied(self.model, setup):
                    cell.decode_seconds = self._decode_seconds(tokens, count)
            except Exception as error:
                # The prefill's time stands.
                cell.reason = f"decoding: {one_line(error)}"
            self.clock.forget()

    def _decode_seconds(self, tokens: Tensor, count: int) -> list[float]:
        cache = DynamicCache(config=self.model.config)
        out = self._pass(tokens, cache)
        taken = []
        for _ in range(count):
            last = out.argmax(-1)
            start = self._now()
            out = self._pass(last, cache)
            taken.append(self._now() - start)
        return taken

    def _pass(self, tokens: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Logits of the last token, a cache filled on the way."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        forget_plans()
        logits: Tensor = self.model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def _seconds(self, tokens: Tensor) -> float:
        start = self._now()
        self._pass(tokens)
        return self._now() - start

    def _draw_seconds(self, pattern: SA, n: int) -> float:
        """The median of drawing a layer's permutation, several layers at a time as kernels do."""

        def draw() -> Tensor:
            return pattern.orders(n, range(LAYERS), 1, self.model.device)

        draw()
        taken = statistics.median(self.clock.milliseconds(draw) for _ in range(DRAWS))
        return taken / 1e3 / LAYERS

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _expected(self, setup: Setup, n: int) -> float:
        """Seconds of a pass, from the last length: n to the 1.2, and full attention n squared."""
        if setup.key not in self._last:
            return 0.0
        length, seconds, share = self._last[setup.key]
        ratio = n / length
        squared = share if setup.full else 0.0
        return seconds * (squared * ratio**2 + (1 - squared) * ratio**1.2)

    def _prompt(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        tokens = torch.randint(self.model.config.vocab_size, (1, n), generator=generator)
        return tokens.to(self.model.device)

    def _gone(self, cell: Prefill, error: Exception) -> None:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        cell.status, cell.reason = OUT_OF_MEMORY if full else FAILED, one_line(error)
        cell.seconds = []
        self.say(f"  {cell.name}, n = {cell.n}: {cell.status}: {cell.reason}")
        self.clock.forget()
