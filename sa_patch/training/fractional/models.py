"""Llama with fractional neural attention, which ``from_pretrained`` loads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from sa_patch.errors import UserError
from sa_patch.patterns import Pattern, parse_pattern, seed_of, with_seed
from sa_patch.training.fractional.attention import attend_fractional, check_pattern
from sa_patch.training.fractional.distance_kernel import DistanceKernel
from sa_patch.training.own_attention import (
    pack_inputs,
    refuse_dropout,
    register_attention,
    register_model,
    stock_values,
)

IMPLEMENTATION = "sa_patch_fractional"
"""The name under which fractional attention is registered with transformers."""


class FractionalLlamaConfig(LlamaConfig):
    """Llama's configuration, with the attention of every layer.

    Density normalization and a median bandwidth are not for language models: they depend on sums
    and medians over the whole sequence, through which a token would see what follows it.

    Args:
        fractional_alpha, fractional_geometry: see `DistanceKernel`.
        fractional_pattern: text form of the pattern whose pairs are computed; "full" for all. The
            seed of a random pattern is that of evaluation.
    """

    model_type = "fractional_llama"

    fractional_alpha: float = 1.2
    fractional_geometry: str = "euclidean"
    fractional_pattern: str = "full"


class FractionalLlamaAttention(LlamaAttention):
    """Llama's attention module with a distance kernel and a pattern.

    Attributes:
        drawn: the pattern of the current training step, used instead of `pattern` if set.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kernel, self.pattern = _read(config)
        self.drawn: Pattern | None = None

    @property
    def branches(self) -> tuple[Pattern, ...]:
        """The layer's one pattern. `sa_patch.patch_model` leaves modules with `branches` alone."""
        return (self.pattern,)


def fractional_attention_forward(
    module: FractionalLlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' ``AttentionInterface`` calls it.

    Args:
        query: ``[batch, q_heads, nq, head_dim]``, rotary embeddings applied.
        key, value: ``[batch, kv_heads, n, head_dim]``, cached ones first; the pattern covers
            the whole sequence.
        attention_mask: the `SparseMask` of this forward pass, or None for no padding and no
            cached keys.
        scaling: not used; distances have a scale of their own.

    Returns:
        ``[batch, nq, q_heads, head_dim]``, zero at padding, and None.

    Raises:
        UserError: if the call asks for something such a layer cannot do.
    """
    packing, query, key, value = pack_inputs(
        module, (query, key, value), attention_mask, dropout, kwargs, "fractional"
    )
    out = attend_fractional(
        module.kernel,
        query,
        key,
        value,
        spans=packing.spans,
        pattern=module.pattern if module.drawn is None else module.drawn,
        layer=int(module.layer_idx),
    )
    return packing.unpack(out).transpose(1, 2).contiguous(), None


class FractionalLlamaForCausalLM(LlamaForCausalLM):
    """Llama with `FractionalLlamaAttention` in every layer; its weights are those of a Llama."""

    config_class = FractionalLlamaConfig

    def __init__(self, config: Any) -> None:
        _read(config)
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = FractionalLlamaAttention(config, index)
        self.post_init()


def fractional_model(
    source: LlamaForCausalLM, alpha: float, *, geometry: str = "euclidean", pattern: str = "full"
) -> FractionalLlamaForCausalLM:
    """A Llama with fractional attention, which starts from the weights of a stock one.

    Args:
        source: a Llama, which is left as it is.
        alpha, geometry: see `DistanceKernel`.
        pattern: text form of a pattern.

    Raises:
        UserError: for another family, or a value that is not allowed.
    """
    if source.config.model_type != "llama":
        raise UserError(
            f"fractional attention is for models of the family llama, got "
            f"{source.config.model_type!r}"
        )
    config = FractionalLlamaConfig(
        **stock_values(source.config),
        fractional_alpha=alpha,
        fractional_geometry=geometry,
        fractional_pattern=pattern,
    )
    model = FractionalLlamaForCausalLM(config)
    model.to(device=source.device, dtype=source.dtype)
    model.load_state_dict(source.state_dict())
    model.train(source.training)
    return model


def draw_patterns(model: Any, seed: int | None) -> None:
    """Give all layers random patterns of this seed, or those of evaluation where it is None."""
    for module in model.modules():
        if isinstance(module, FractionalLlamaAttention) and seed_of(module.pattern) is not None:
            module.drawn = None if seed is None else with_seed(module.pattern, seed)


def _read(config: Any) -> tuple[DistanceKernel, Pattern]:
    """The kernel and the pattern of a configuration, checked before a model is built."""
    kernel = DistanceKernel(config.fractional_alpha, config.fractional_geometry)
    kernel.check_head_dim(config.head_dim)
    pattern = parse_pattern(config.fractional_pattern)
    check_pattern(pattern)
    refuse_dropout(config, "fractional")
    return kernel, pattern


register_attention(IMPLEMENTATION, fractional_attention_forward)
register_model(FractionalLlamaConfig, FractionalLlamaForCausalLM)
