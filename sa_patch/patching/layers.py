"""Which attention layers a model has, and which of them are to be sparse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patterns import SWA, Pattern

# Where attention modules of transformers keep what chooses or condenses their keys (DeepSeek-V3.2
# and V4, GLM-5, MiniMax-M3, ...). Their model files prepare masks for it, but only for
# implementations that they know by name.
_OWN_CHOICES = ("indexer", "compressor")

# What `layer_types` of transformers call layers with a window of their own, and those without.
_SLIDING, _CHUNKED = {"sliding_attention", "hybrid_sliding"}, "chunked_attention"
_FULL = {"full_attention", "hybrid"}


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


def key_sources(modules: Mapping[int, nn.Module]) -> dict[int, int]:
    """Layers that take the keys and values of an earlier one, and the index of that one.

    In Gemma 3n and 4 the last layers do: each takes them of the last layer of its kind before.

    Args:
        modules: as `attention_layers` gives them.
    """
    latest: dict[Any, int] = {}
    found: dict[int, int] = {}
    for index, module in modules.items():
        kind = getattr(module, "layer_type", None)
        if getattr(module, "is_kv_shared_layer", False):
            found[index] = latest[kind]
        else:
            latest[kind] = index
    return found


def default_layers(model: PreTrainedModel) -> set[int]:
    """The layers that are sparse where nothing else is said.

    All, except those that have a window of their own in a model that also has full layers (as
    Gemma does).
    """
    return full_layers(model.config.get_text_config(), attention_layers(model))


def full_layers(config: Any, available: Iterable[int]) -> set[int]:
    """Of the available layers those without a window of their own; all where none is told by kind.

    Args:
        config: a model's text configuration.
    """
    every, kinds = set(available), getattr(config, "layer_types", None) or ()
    return {i for i, kind in enumerate(kinds) if kind in _FULL and i in every} or every


@dataclass(frozen=True)
class OwnChunk(Pattern):
    """Query i sees its own chunk of `size` tokens up to itself, as in most layers of Llama 4.

    It is in no registry: layers show it unpatched, and nobody can ask for it.
    """

    size: int = field(metadata={"always": True})

    name: ClassVar[str] = "own_chunk"
    summary: ClassVar[str] = "a model's own chunk of tokens"

    def visible(
        self, query_positions: Tensor, seq_len: int, *, layer: int = 0, **others: Any
    ) -> Tensor:
        queries = query_positions[:, None]
        keys = torch.arange(seq_len, device=query_positions.device)
        return ((keys <= queries) & (keys >= queries // self.size * self.size))[None]

    def keys_per_query(self, seq_len: int) -> Tensor:
        return (torch.arange(seq_len) % self.size + 1).double()

    def saturated(self, seq_len: int) -> bool:
        return self.size >= seq_len

    @property
    def effective_window(self) -> int:
        return self.size

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        return self.keys_per_query(seq_len).long()[None]


def own_windows(config: Any) -> dict[int, SWA | OwnChunk]:
    """Layers with a window of their own, by a model's text configuration, and what it shows.

    Without `layer_types` every layer slides the window that a configuration declares, as the masks
    of Mistral, Mixtral, Phi-3, Starcoder2 and Qwen3-MoE do.
    """
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    # A conversion may leave a value in a configuration whose class has none; no mask reads it.
    if not kinds and hasattr(type(config), "sliding_window"):
        kinds = ["sliding_attention"] * config.num_hidden_layers
    found: dict[int, SWA | OwnChunk] = {}
    for index, kind in enumerate(kinds or ()):
        if kind in _SLIDING and window:
            found[index] = SWA(int(window))
        elif kind == _CHUNKED and chunk:
            found[index] = OwnChunk(int(chunk))
    return found


def beyond_own_window(config: Any, size: int, tokens: int) -> str:
    """Why layers with a window of their own refuse a longer sequence, and what can be done.

    Args:
        config: the model's text configuration.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    own = "attention chunk" if _CHUNKED in kinds else "sliding window"
    says = f"the model's own {own} of {size} tokens is shorter than this sequence of {tokens}; "
    # Where no kind has the window that was met, as in MiniMax, full layers slide it too.
    told = kinds & (_SLIDING | {_CHUNKED})
    if told and kinds & _FULL:
        return says + "leave its layers out with layers=..."
    says += "no attention layer of this model sees more, so give shorter sequences"
    if told:
        return says
    return says + ", or set sliding_window=None in model.config if you accept a changed model"


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
