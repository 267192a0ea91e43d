"""Where a forward pass spends its time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_patch.patching.layers import attention_layers

CORE, PROJECTIONS, MLP, REST = "attention", "projections", "mlp", "rest"
PARTS = (CORE, PROJECTIONS, MLP, REST)
_WHOLE, _MODULE = "whole", "attention module"


class Stopwatch:
    """Adds up the time of named stretches of one forward pass, without holding it up.

    On a GPU events are queued with the work and read once it is done, so that a stretch is the
    time that the GPU spent, gaps in which it waited for Python included.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: dict[str, Any] = {}
        self._stretches: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        self._stretches.append((name, self._open.pop(name), self._mark()))

    def seconds(self) -> dict[str, float]:
        """The sum of each name's stretches."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: Counter[str] = Counter()
        for name, start, end in self._stretches:
            found[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(found)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_parts(model: PreTrainedModel, forward: Callable[[], object]) -> dict[str, float]:
    """Seconds that one forward pass spends in each of `PARTS`.

    "attention" is the attention function alone: scores, softmax and values, and for a patched model
    all that choosing keys takes. "projections" is the rest of the attention modules: q, k, v and
    output projections, norms of heads, rotary embeddings, cache. "mlp" is the feed-forward
    modules, a mixture's routing included. "rest" is everything else: embedding, norms, masks,
    logits.

    Args:
        forward: makes one pass of `model`, which may be patched.
    """
    watch = Stopwatch(model.device)
    with ExitStack() as stack:
        for module in attention_layers(model).values():
            stack.enter_context(_watched(module, watch, _MODULE))
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                stack.enter_context(_watched(module, watch, MLP))
        stack.enter_context(_watched_function(model.config._attn_implementation, watch))
        watch.start(_WHOLE)
        forward()
        watch.stop(_WHOLE)
    taken = watch.seconds()
    core, module_time, mlp = (taken.get(name, 0.0) for name in (CORE, _MODULE, MLP))
    rest = taken[_WHOLE] - module_time - mlp
    return {CORE: core, PROJECTIONS: module_time - core, MLP: mlp, REST: rest}


@contextmanager
def _watched(module: nn.Module, watch: Stopwatch, name: str) -> Iterator[None]:
    def before(*_: Any) -> None:
        watch.start(name)

    def after(*_: Any) -> None:
        watch.stop(name)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_function(implementation: str, watch: Stopwatch) -> Iterator[None]:
    def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch.start(CORE)
        try:
            return function(*args, **kwargs)
        finally:
            watch.stop(CORE)

    with around_attention(implementation, timed):
        yield


@contextmanager
def around_attention(implementation: str, around: Callable[..., Any]) -> Iterator[None]:
    """Let every call of an attention function pass through `around`, inside the ``with`` block.

    Args:
        implementation: its name in transformers' attention interface.
        around: gets the function and then its arguments; what it returns is the call's result.
    """
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    AttentionInterface.register(implementation, partial(around, function))
    try:
        yield
    finally:
        AttentionInterface.register(implementation, function)
