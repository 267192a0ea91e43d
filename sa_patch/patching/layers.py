"""Which attention layers a model has, and which of them are to be sparse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from sa_patch.errors import UserError

# Where attention modules of transformers keep what chooses or condenses their keys (DeepSeek-V3.2
# and V4, GLM-5, MiniMax-M3, ...). Their model files prepare masks for it, but only for
# implementations that they know by name.
_OWN_CHOICES = ("indexer", "compressor")


def wrappers(model: Any) -> list[Any]:
    """The model and all that it is wrapped in, from the outside in: torch.compile, adapters."""
    found = [model]
    while True:
        outer = found[-1]
        if isinstance(outer, OptimizedModule):
            found.append(outer._orig_mod)
        elif hasattr(outer, "get_base_model") and not isinstance(outer, PreTrainedModel):
            found.append(outer.get_base_model())
        else:
            return found


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, without what is wrapped around it (`wrappers`).

    Raises:
        UserError: if there is none.
    """
    inner = wrappers(model)[-1]
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            "patch_model takes a transformers causal language model "
            f"(a PreTrainedModel), got {type(model).__name__}"
        )
    return inner


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part that reads tokens, whose attention is exchanged; of most models all of it.

    A model with images has parts of other kinds, which keep their attention.
    """
    config = model.config.get_text_config()
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in parts if part.config is config), model)


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The model's causal attention modules by layer index, in order.

    Raises:
        UserError: if the model cannot be patched, with the reason.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model; only decoder-only models are patched")
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{name} does not go through transformers' attention interface, so its attention "
            "cannot be exchanged; use a model of transformers that does (Qwen3, Llama, Mistral...)"
        )
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not getattr(module, "is_causal", False):
            continue
        if index in found:
            raise UserError(f"{name} has several attention modules in layer {index}; not supported")
        own = next((part for part in _OWN_CHOICES if getattr(module, part, None) is not None), None)
        if own is not None:
            raise UserError(
                f"{name} chooses keys itself, by the {own} of layer {index}, and no pattern can "
                "take the place of that; use a model whose layers see all keys or a window"
            )
        found[index] = module
    if not found:
        raise UserError(f"{name} has no causal self-attention layer to patch")
    return dict(sorted(found.items()))


def default_layers(model: PreTrainedModel) -> set[int]:
    """The layers that are sparse where nothing else is said.

    All, except those that have a window of their own in a model that also has full layers (as
    Gemma does).
    """
    available = attention_layers(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    full = {i for i in available if i < len(kinds) and kinds[i] == "full_attention"}
    return full or set(available)


def own_windows(model: PreTrainedModel) -> dict[int, int]:
    """Layers that have a sliding window of their own, and how many keys it shows a query."""
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or not kinds:
        return {}
    sliding = (i for i in attention_layers(model) if kinds[i : i + 1] == ["sliding_attention"])
    return dict.fromkeys(sliding, int(window))


def parse_layers(layers: Iterable[int] | str | int) -> set[int]:
    """Layer indices from integers, or from text such as ``"4-35"``, ``"0,1,5-7"`` or ``"0+1"``.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(layers, int) and not isinstance(layers, bool):
        return {layers}
    if not isinstance(layers, str):
        values = list(layers) if isinstance(layers, Iterable) else [layers]
        if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
            raise UserError(f"layers must be whole numbers, got {values!r}")
        return set(values)
    chosen: set[int] = set()
    # "+" serves where commas already separate arguments, as in lm-eval's --model_args.
    for part in filter(None, (piece.strip() for piece in layers.replace("+", ",").split(","))):
        first, dash, last = part.partition("-")
        numbers = (first, last if dash else first)
        # isdecimal() alone admits digits of every script.
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            raise UserError(
                f"layers are written as numbers and ranges, such as 4-35 or 0,1,5-7; got {part!r}"
            )
        low, high = map(int, numbers)
        if high < low:
            raise UserError(
                f"a range of layers ends before it begins: {part!r}; write {high}-{low}"
            )
        chosen.update(range(low, high + 1))
    return chosen


def format_layers(layers: Iterable[int]) -> str:
    """The shortest text that `parse_layers` reads back: ``{0, 1, 2, 5}`` is ``"0-2,5"``."""
    runs: list[list[int]] = []
    for index in sorted(layers):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
