"""Times every setup of a model at every length, within a time limit."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sa_patch.benchmark.clock import Call, Clock
from sa_patch.benchmark.measuring import Measurer
from sa_patch.benchmark.prefill.parts import CORE, time_parts
from sa_patch.benchmark.prefill.record import Prefill
from sa_patch.benchmark.prefill.setups import Setup, applied
from sa_patch.benchmark.record import TIMED
from sa_patch.benchmark.tables import Say
from sa_patch.benchmark.time_plan import Seen
from sa_patch.errors import one_line
from sa_patch.kernels import forget_plans
from sa_patch.kernels.counting import counting_backends
from sa_patch.patterns import SA

MIN_ROUNDS, MAX_ROUNDS = 2, 10
DRAWS = 20
# Layers whose permutations are drawn for one measurement.
LAYERS_DRAWN_TOGETHER = 16


@dataclass
class Contestant:
    """A setup, and how its time grows with the prompt.

    Args:
        attention: share of its last pass that was spent in attention.
    """

    setup: Setup
    attention: float = 0.0

    @property
    def key(self) -> str:
        return self.setup.key

    def time_growth(self, shorter: int, longer: int) -> float:
        """n to the 1.2, and full attention n squared."""
        ratio = longer / shorter
        squared = self.attention if self.setup.full else 0.0
        return float(squared * ratio**2 + (1 - squared) * ratio**1.2)

    def memory_growth(self, shorter: int, longer: int) -> float:
        return longer / shorter


class PrefillMeasurer(Measurer[Contestant, Prefill]):
    """Measures one model.

    Args:
        name: of the model in the record.
        deadline: of `time.monotonic`; what cannot be done before it is skipped, with the reason.
        decoded: tokens to write after the prompt, stock and with the first sparse setup.
        longest: tokens of prompt and text together that the model was made for, beyond which
            none are written; None for any number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        setups: Sequence[Setup],
        deadline: float,
        *,
        decoded: int,
        longest: int | None,
        say: Say,
    ) -> None:
        super().__init__(Clock(model.device.type), deadline, MAX_ROUNDS, say, least=MIN_ROUNDS)
        self.model, self.name, self.decoded, self.longest = model, name, decoded, longest
        self.contestants = [Contestant(setup) for setup in setups]

    @torch.inference_mode()
    def measure(self, n: int, share: float, record: list[Prefill]) -> None:
        """Measure all setups at length n into `record`, save those that it holds already.

        Args:
            share: of the time that is left, what this length may take for more than the fewest
                rounds; these are refused only where they do not fit before the deadline.
        """
        generator = torch.Generator().manual_seed(n)
        tokens = torch.randint(self.model.config.vocab_size, (1, n), generator=generator)
        self._tokens = tokens.to(self.model.device)
        settled = {(c.label, c.backend) for c in record if (c.model, c.n) == (self.name, n)}
        pairs = [
            (one, self._cell(one.setup, n))
            for one in self.contestants
            if (one.setup.label, one.setup.backend) not in settled
        ]
        if not pairs:
            return
        record += [cell for _, cell in pairs]
        self.check_and_time(n, pairs, share, within_share=False)
        timed = [(one.setup, cell) for one, cell in pairs if cell.status == TIMED]
        stock = [pair for pair in timed if pair[0].pattern is None]
        self._decode(stock + [pair for pair in timed if not pair[0].full][:1], n)

    def _cell(self, setup: Setup, n: int) -> Prefill:
        return Prefill(
            model=self.name, n=n, label=setup.label, backend=setup.backend, full=setup.full
        )

    def check(self, one: Contestant, cell: Prefill) -> Seen:
        """One pass for parts, counts and memory, after one that warms up if that costs little."""
        if self.history.quick(one, cell.n):
            with applied(self.model, one.setup):
                self._pass()
        cell.extra_bytes = self._look(one.setup, cell)
        if isinstance(one.setup.pattern, SA):
            cell.draw_seconds = self._draw_seconds(one.setup.pattern, cell.n)
        whole = sum(cell.parts.values())
        one.attention = cell.parts[CORE] / whole
        return Seen(cell.n, 1e3 * whole, cell.extra_bytes)

    def milliseconds(self, one: Contestant) -> float:
        with applied(self.model, one.setup):
            return self.clock.milliseconds(self._pass)

    def _look(self, setup: Setup, cell: Prefill) -> int:
        def look() -> Tensor:
            with counting_backends() as calls:
                cell.parts = time_parts(self.model, self._pass)
            cell.calls = dict(calls)
            return torch.empty(0)

        if self.clock.device.type == "cuda":
            return self._memory(setup, look)
        # The profiler that counts bytes on a CPU slows small operations: no time is taken then.
        with applied(self.model, setup):
            look()
        return self._memory(setup, self._pass)

    def _memory(self, setup: Setup, call: Call) -> int:
        """The peak of a pass of a model that keeps nothing of an earlier one.

        Plans, or a cache that a patched model still holds, would be given back inside, and what is
        given back counts against the peak.
        """
        forget_plans()
        with applied(self.model, setup):
            return self.clock.memory(call)[1]

    def _decode(self, chosen: Sequence[tuple[Setup, Prefill]], n: int) -> None:
        """Write after the prompt."""
        count = self.decoded
        if self.longest is not None:
            count = min(count, self.longest - n)
        for setup, cell in chosen if count else ():
            if self.left() < 0:
                continue
            try:
                with applied(self.model, setup):
                    cell.decode_seconds = self._decode_seconds(count)
            except Exception as error:
                # The prefill's time stands.
                cell.reason = f"decoding: {one_line(error)}"
            self.clock.forget()

    def _decode_seconds(self, count: int) -> list[float]:
        cache = DynamicCache(config=self.model.config)
        last = self._pass(cache=cache).argmax(-1)

        def step() -> Tensor:
            nonlocal last
            last = self._pass(last, cache).argmax(-1)
            return last

        return [self.clock.milliseconds(step) / 1e3 for _ in range(count)]

    def _pass(self, tokens: Tensor | None = None, cache: DynamicCache | None = None) -> Tensor:
        """Logits of the last token, of the prompt by default, a cache filled on the way."""
        tokens = self._tokens if tokens is None else tokens
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        forget_plans()
        logits: Tensor = self.model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def _draw_seconds(self, pattern: SA, n: int) -> float:
        """The median of drawing a layer's permutation, several layers at a time as kernels do."""
        layers, device = range(LAYERS_DRAWN_TOGETHER), self.model.device
        orders = _drawing(device)

        def draw() -> Tensor:
            with torch.cuda.device_of(self._tokens):
                return orders(pattern, n, layers, 1, device)

        draw()
        taken = statistics.median(self.clock.milliseconds(draw) for _ in range(DRAWS))
        return taken / 1e3 / len(layers)


def _drawing(device: torch.device) -> Callable[..., Tensor]:
    """How the kernels of a device draw permutations, with the arguments of `SA.orders`."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return SA.orders
    from sa_patch.kernels.triton.rings.draws import orders

    return orders
