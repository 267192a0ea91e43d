"""Is a patched model right at this size and precision? Spot checks, before any time is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch.benchmark.clock import device_lives
from sa_patch.benchmark.prefill.record import NOISE, Verdict
from sa_patch.benchmark.prefill.setups import STOCK, Setup, applied
from sa_patch.errors import one_line
from sa_patch.kernels.counting import counting_backends
from sa_patch.patching import attention_layers

# Times what two right implementations differ by. A key too many, a wrong scale or a wrong layer's
# permutation moves the logits by a good part of themselves, a hundred times as much.
ROOM = 4.0
# Where the two agree by chance to the last bit, rounding alone is still allowed.
LEAST = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
LAST, RUNS = "padding", "runs"


@torch.inference_mode()
def verify(model: PreTrainedModel, name: str, setups: Sequence[Setup], n: int) -> Iterator[Verdict]:
    """Check every setup on a random prompt of n tokens.

    - "equals stock": full attention on our backends against the stock model's, allowed what the
      stock model's own two implementations (sdpa and eager) differ by, with room.
    - "equals reference": a pattern against the dense `reference` backend in the same precision,
      allowed what `banded` differs by from that, with room.
    - "backend": every layer calls the backend that was asked for, once.
    - "causal": logits before a changed token do not move.
    - "padding": a left-padded row in a batch gives what it gives alone.
    - "runs": in place of these, of a setup that raised; the next one is checked all the same.

    Raises:
        Exception: what a setup raised, after its verdict, if the device was lost with it.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, n), generator=generator).to(model.device)
    stock = _logits(model, Setup(), tokens)
    noise = relative_error(_eager_logits(model, tokens), stock)
    for setup in setups:
        if setup.pattern is None:
            continue
        raised: Exception | None = None
        try:
            found = list(_check(model, name, setup, tokens, stock, noise))
        except Exception as error:
            raised = error
            found = [Verdict(name, RUNS, setup.key, math.inf, 0.0, one_line(error))]
        yield from found
        if raised is not None and not device_lives(model.device):
            raise raised
    # What both are allowed to differ by: all of the logits, for then nothing above meant anything.
    yield Verdict(name, NOISE, f"{STOCK}: eager against sdpa", noise, 1.0)


def settled(verdicts: Sequence[Verdict], name: str) -> set[str]:
    """The setups of a model that were checked to the end, by key."""
    return {one.label for one in verdicts if one.model == name and one.check in (LAST, RUNS)}


def _check(
    model: PreTrainedModel, name: str, setup: Setup, tokens: Tensor, stock: Tensor, noise: float
) -> Iterator[Verdict]:
    with counting_backends() as calls:
        ours = _logits(model, setup, tokens)
    if setup.full:
        allowed = _allowed(noise, model)
        yield Verdict(name, "equals stock", setup.key, relative_error(ours, stock), allowed)
    else:
        dense = _logits(model, Setup(setup.pattern, "reference"), tokens)
        other = _logits(model, Setup(setup.pattern, "banded"), tokens)
        allowed = _allowed(relative_error(other, dense), model)
        error = relative_error(ours, dense)
        yield Verdict(name, "equals reference", setup.key, error, allowed)
    yield _backend_verdict(model, name, setup, dict(calls))
    yield Verdict(name, "causal", setup.key, _leak(model, setup, tokens, ours), allowed)
    yield Verdict(name, LAST, setup.key, _moved(model, setup, tokens), allowed)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of `truth`, in float64; NaN passes no check."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm())


def _allowed(noise: float, model: PreTrainedModel) -> float:
    return ROOM * max(noise, LEAST[model.dtype])


def _logits(
    model: PreTrainedModel, setup: Setup, tokens: Tensor, mask: Tensor | None = None
) -> Tensor:
    with applied(model, setup):
        logits: Tensor = model(tokens, attention_mask=mask, use_cache=False).logits
    return logits


def _eager_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return _logits(model, Setup(), tokens)
    finally:
        model.set_attn_implementation(before)


def _backend_verdict(
    model: PreTrainedModel, name: str, setup: Setup, calls: dict[str, int]
) -> Verdict:
    layers = len(attention_layers(model))
    wanted = layers if setup.backend == "auto" else calls.get(setup.backend, 0)
    wrong = abs(wanted - layers) + abs(sum(calls.values()) - layers)
    detail = f"(calls {calls} in {layers} layers)"
    return Verdict(name, "backend", setup.key, float(wrong), 0.0, detail)


def _leak(model: PreTrainedModel, setup: Setup, tokens: Tensor, before: Tensor) -> float:
    """How far logits move before a changed token, as `relative_error`."""
    place = 3 * tokens.shape[1] // 4
    changed = tokens.clone()
    changed[:, place:] = (changed[:, place:] + 1) % model.config.vocab_size
    after = _logits(model, setup, changed)
    return relative_error(after[:, :place], before[:, :place])


def _moved(model: PreTrainedModel, setup: Setup, tokens: Tensor) -> float:
    """How far a row's logits move when it is left-padded beside a longer one."""
    short = tokens[:, : max(1, tokens.shape[1] - 100)]
    padding = tokens.shape[1] - short.shape[1]
    alone = _logits(model, setup, short)
    padded = torch.cat([tokens[:, :padding], short], dim=1)
    mask = torch.ones(2, tokens.shape[1], dtype=torch.int64, device=tokens.device)
    mask[1, :padding] = 0
    beside = _logits(model, setup, torch.cat([tokens, padded]), mask)
    return relative_error(beside[1:, padding:], alone)
