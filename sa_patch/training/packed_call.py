"""What the attentions of our own models begin with: checks, and rows without their padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sa_patch.patching.attention import refuse_unsupported, require_own_mask
from sa_patch.patching.mask import Packing, SparseMask


def packed_call(
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    dropout: float,
    kwargs: dict[str, Any],
    model: str,
) -> tuple[Packing, Tensor, Tensor, Tensor]:
    """The packing of a call by transformers' ``AttentionInterface``, and q, k and v packed by it.

    Args:
        tensors: query ``[batch, q_heads, nq, head_dim]``, key and value ``[batch, kv_heads, n,
            head_dim]``, cached ones first.
        mask: the `SparseMask` of the forward pass, or None for no padding and no cached keys.
        model: what kind of model this is, for messages.

    Raises:
        UserError: if the call asks for something a sparse layer cannot do.
    """
    query, key, value = tensors
    if mask is None:
        mask = SparseMask.causal(query.shape[0], query.shape[2], query.device)
    require_own_mask(mask, model)
    refuse_unsupported(module, mask, dropout, kwargs)
    packing = mask.packing()
    # A static cache holds more keys than are in use.
    key, value = key[:, :, : mask.key_len], value[:, :, : mask.key_len]
    return (
        packing,
        packing.pack(query, packing.query_order),
        packing.pack(key, packing.key_order),
        packing.pack(value, packing.key_order),
    )
