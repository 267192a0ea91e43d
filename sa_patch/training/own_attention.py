"""Models with an attention of their own: registered, called, and built from stock ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from sa_patch.errors import UserError
from sa_patch.patching.attention import refuse_unsupported, require_own_mask
from sa_patch.patching.mask import Packing, SparseMask, sparse_mask


def register_attention(name: str, forward: Callable[..., tuple[Tensor, None]]) -> None:
    """Make an attention function known to transformers, with our masks."""
    AttentionInterface.register(name, forward)
    # Without a mask function of the same name transformers would drop the padding mask in silence.
    AttentionMaskInterface.register(name, sparse_mask)


def register_model(config: Any, model: Any) -> None:
    """Make a model class known to transformers' Auto classes."""
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)


def stock_values(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration of ours takes over from that of a stock model."""
    own = ("model_type", "architectures")
    return {key: value for key, value in config.to_dict().items() if key not in own}


def refuse_dropout(config: Any, attention: str) -> None:
    """Raise `UserError` for attention dropout; `attention` is the kind of attention."""
    if config.attention_dropout:
        raise UserError(
            f"attention dropout is not supported with {attention} attention; set it to 0"
        )


def pack_inputs(
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    dropout: float,
    kwargs: dict[str, Any],
    attention: str,
) -> tuple[Packing, Tensor, Tensor, Tensor]:
    """Check a call by transformers' ``AttentionInterface``, and remove the padding from its rows.

    Args:
        tensors: query ``[batch, q_heads, nq, head_dim]``, key and value ``[batch, kv_heads, n,
            head_dim]``, cached ones first.
        mask: the `SparseMask` of the forward pass, or None for no padding and no cached keys.
        attention: the kind of attention, for messages.

    Returns:
        The packing, and q, k and v packed by it.

    Raises:
        UserError: if the call asks for something a sparse layer cannot do.
    """
    query, key, value = tensors
    if mask is None:
        mask = SparseMask.causal(query.shape[0], query.shape[2], query.device)
    require_own_mask(mask, f"a model with {attention} attention")
    refuse_unsupported(module, mask, dropout, kwargs)
    packing = mask.packing(kwargs)
    # A static cache holds more keys than are in use.
    key, value = key[:, :, : mask.key_len], value[:, :, : mask.key_len]
    return (
        packing,
        packing.pack(query, packing.query_order),
        packing.pack(key, packing.key_order),
        packing.pack(value, packing.key_order),
    )
