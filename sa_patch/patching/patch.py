"""Exchange the attention of a loaded model, and put it back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.kernels import check_backend, expect_layers
from sa_patch.patching.attention import IMPLEMENTATION, OWN_NAMES
from sa_patch.patching.drafting import draft_after_prompt
from sa_patch.patching.layers import (
    attention_layers,
    base_model,
    key_sources,
    own_windows,
    text_model,
)
from sa_patch.patching.plan import LayerPlan, Observer, get_plan, set_plan
from sa_patch.patching.reading import Reading, read_prompts
from sa_patch.patching.refusals import (
    refuse_continuous_batching,
    refuse_decoding,
    refuse_other_heads,
    refuse_prefix_adapter,
)
from sa_patch.patching.schedule import Layers, Schedule
from sa_patch.patterns import SA, Full, Pattern, parse_pattern

Model = TypeVar("Model")

DECODE_MODES = ("full", "pattern")


def patch_model(
    model: Model,
    pattern: Pattern | str | None = None,
    *,
    window: int | None = None,
    layers: Layers = None,
    decode: str = "full",
    backend: str = "auto",
) -> Model:
    """Make the prefill attention of a causal language model sparse, in place.

    Weights are not touched, and positions neither: rotary embeddings are applied before the
    pattern. A model that is patched already takes on the new pattern in all its layers.

    Args:
        model: any decoder-only model of transformers that uses its attention interface.
        pattern: which keys a query sees, or its text form (``"swa:window=256"``).
        window: short for ``SA(window=window)``, the default method.
        layers: indices of the layers to make sparse, or text such as ``"4-35"``; the others keep
            their stock attention. Or a mapping of these to patterns, their text forms, or None or
            "full" for stock attention (``{"0-3": "full", 7: SWA(64)}``); layers that it does not
            name take the pattern if one is given, else keep their stock attention. Default: all
            full-attention layers.
        decode: what generated tokens see. "full": everything. "pattern": the pattern goes on over
            the whole sequence; layers whose pattern reaches no further than sinks and a window
            then keep no other keys in a dynamic cache, so that its size no longer grows; a layer
            whose keys later layers take keeps what these reach, too. Layers with any other
            pattern, and static, quantized or foreign caches, keep all keys. Several
            tokens behind cached keys are prompt, whatever `decode` says, unless `generate`
            verifies them as a draft; patterns that are not prefix-stable refuse them.
        backend: kernel backend, or "auto" for the fastest that is able.

    Returns:
        The same model.

    Raises:
        UserError: for a bad argument, or a model that cannot be patched, with the reason. The
            model is then as it was.
    """
    schedule = Schedule.read(layers)
    given = _read_pattern(pattern, window, optional=schedule.own is not None)
    check_decode(decode)
    check_backend(backend)
    inner = base_model(model)
    modules = attention_layers(inner)
    expect_layers(1 + max(modules, default=0))
    assigned = _keep_branches(inner, schedule.assign(inner, given))
    refuse_prefix_adapter(model, assigned.values())
    refuse_other_heads(inner, assigned.values())
    if decode == "pattern":
        refuse_decoding(assigned.values())
    stock = _stock_implementation(inner)
    if text_model(inner).config._attn_implementation != IMPLEMENTATION:
        _own_config(inner)
    reading, sources = Reading(), key_sources(modules)
    for index, module in modules.items():
        takers = tuple(assigned[taker] for taker, source in sources.items() if source == index)
        plan = LayerPlan(assigned[index], decode, backend, stock, reading, takers=takers)
        set_plan(module, plan)
    text_model(inner).set_attn_implementation(IMPLEMENTATION)
    _say_what_is_read(inner, reading)
    return model


def check_decode(decode: str) -> str:
    """Return `decode` if it is a known mode.

    Raises:
        UserError: otherwise.
    """
    if decode not in DECODE_MODES:
        raise UserError(f"decode must be 'full' or 'pattern', got {decode!r}")
    return decode


def unpatch_model(model: Model) -> Model:
    """Give a model its stock attention back; one that is not patched is left as it is.

    Returns:
        The same model, whose logits are bit-identical to those before it was patched.
    """
    inner = base_model(model)
    stock = _stock_implementation(inner)
    for module in inner.modules():
        set_plan(module, None)
    _say_what_is_read(inner, None)
    text = text_model(inner)
    if text.config._attn_implementation in OWN_NAMES:
        text.set_attn_implementation(stock)
    return model


@contextmanager
def patched(
    model: Model,
    pattern: Pattern | str | None = None,
    *,
    window: int | None = None,
    layers: Layers = None,
    decode: str = "full",
    backend: str = "auto",
) -> Iterator[Model]:
    """`patch_model` for the length of a ``with`` block, exceptions included.

    What was there before comes back, be it stock attention or another pattern.
    """
    inner = base_model(model)
    before = {index: get_plan(module) for index, module in attention_layers(inner).items()}
    name = inner.config._attn_implementation
    patch_model(model, pattern, window=window, layers=layers, decode=decode, backend=backend)
    try:
        yield model
    finally:
        if all(plan is None for plan in before.values()):
            unpatch_model(model)
            if name in OWN_NAMES:
                inner.set_attn_implementation(name)
        else:
            for index, module in attention_layers(inner).items():
                set_plan(module, before[index])
            _say_what_is_read(inner, next(plan.reading for plan in before.values() if plan))
            text_model(inner).set_attn_implementation(IMPLEMENTATION)


def layer_patterns(model: object) -> dict[int, Pattern | None]:
    """The pattern of every attention layer of a model, None where it has its stock attention."""
    plans = {i: get_plan(module) for i, module in attention_layers(base_model(model)).items()}
    return {index: None if plan is None else plan.pattern for index, plan in plans.items()}


def stock_patterns(model: object) -> dict[int, Pattern]:
    """What every attention layer of a model shows unpatched: all keys, or a window of its own."""
    inner = base_model(model)
    windows = own_windows(inner.config.get_text_config())
    return {index: windows.get(index, Full()) for index in attention_layers(inner)}


def layer_branches(model: object) -> dict[int, tuple[Pattern, ...]]:
    """The patterns that layers were trained with, of models whose attention is sparse unpatched.

    An attention module of such a model has them as `branches`, each a softmax of its own; layers
    without any are left out.
    """
    modules = attention_layers(base_model(model))
    found = {index: tuple(getattr(module, "branches", ())) for index, module in modules.items()}
    return {index: branches for index, branches in found.items() if branches}


def observe_layers(model: object, observer: Observer, layers: Iterable[int]) -> None:
    """Have patched layers call `observer` before each sparse attention, until the next patch."""
    modules = attention_layers(base_model(model))
    for index in layers:
        plan = get_plan(modules[index])
        if plan is not None:
            set_plan(modules[index], dataclasses.replace(plan, observer=observer))


def _say_what_is_read(model: PreTrainedModel, reading: Reading | None) -> None:
    """Have `generate` of a model tell its layers what they read, or no longer."""
    read_prompts(model, reading)
    draft_after_prompt(model, reading)
    refuse_continuous_batching(model, active=reading is not None)


def _keep_branches(
    model: PreTrainedModel, assigned: dict[int, Pattern | None]
) -> dict[int, Pattern | None]:
    """The assignment, in which "full" means a layer's own branches where it has some."""
    own = layer_branches(model)
    for index in own:
        pattern = assigned[index]
        if pattern is not None and not isinstance(pattern, Full):
            raise UserError(
                f"layer {index} of this model was trained with patterns of its own "
                f"({', '.join(map(str, own[index]))}) and takes no other; leave the method out, "
                "or give full, to use it as it is"
            )
    return assigned | dict.fromkeys(own)


def _read_pattern(
    pattern: Pattern | str | None, window: int | None, optional: bool
) -> Pattern | None:
    if pattern is not None and window is not None:
        raise UserError("give patch_model either a pattern or window=, not both")
    if window is not None:
        return SA(window=window)
    if isinstance(pattern, str):
        return parse_pattern(pattern)
    if isinstance(pattern, Pattern):
        return pattern
    if pattern is None and optional:
        return None
    if pattern is None:
        raise UserError(
            "patch_model needs window=..., for example patch_model(model, window=128), "
            "a pattern such as SWA(window=256), or layers={layer: pattern}"
        )
    raise UserError(f"pattern must be a pattern such as SA(window=128), got {pattern!r}")


def _stock_implementation(model: PreTrainedModel) -> str:
    """The attention implementation the model had, or has, unpatched."""
    for module in model.modules():
        plan = get_plan(module)
        if plan is not None:
            return plan.stock
    current = str(text_model(model).config._attn_implementation)
    # A model that was loaded under a name of ours goes back to what it would have had without.
    return str(model.get_correct_attn_implementation(None)) if current in OWN_NAMES else current


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration object of its own.

    The attention implementation is a field of the configuration, and models built from one
    configuration object share it: without this, patching one would reach into the others.
    """
    shared = model.config
    own = copy.deepcopy(shared)
    copies = {id(shared): own}
    for name in shared.sub_configs:
        copies[id(getattr(shared, name))] = getattr(own, name)
    for module in model.modules():
        if id(getattr(module, "config", None)) in copies:
            module.config = copies[id(module.config)]
