"""Our attention and masks as transformers calls them, also while a graph of a model is made.

A prefill becomes part of the graph, as the operators of `sa_patch.patching.operator`; whatever else
a layer does (cached keys, padding-free batches, caches that drop keys) runs outside of graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable, is_compiling
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from sa_patch.kernels.inputs import cast_together
from sa_patch.patching import operator
from sa_patch.patching.attention import (
    IMPLEMENTATION,
    own_softmax,
    refuse_chosen_keys,
    refuse_share_of_heads,
    refuse_unsupported,
    sparse_attention_forward,
    stock_function,
)
from sa_patch.patching.documents import PADDING, document_numbers
from sa_patch.patching.mask import OUTSIDE_OF_GRAPHS, SparseMask, sparse_mask
from sa_patch.patching.plan import get_plan
from sa_patch.patching.tile_queries import tile_queries

# A compiler would pin lengths one by one, recompiling for minutes.
_attention_outside = disable(sparse_attention_forward, reason=OUTSIDE_OF_GRAPHS)
_mask_outside = disable(sparse_mask, reason=OUTSIDE_OF_GRAPHS)


class GraphMask(SparseMask):
    """The mask of a prefill whose graph is being made."""

    def __init__(self, arguments: dict[str, Any]):
        super().__init__(arguments)
        self._layout: Tensor | None = None

    @property
    def refusal(self) -> str | None:
        """In a graph the operator that reads the layout says so, when it runs."""
        return None if is_compiling() else super().refusal

    def layout(self) -> Tensor | None:
        """Of the operator of this name; None for rows of one document without padding."""
        arguments = self._arguments
        padding, function = arguments.get("attention_mask"), arguments["mask_function"]
        if self._layout is None and padding is not None:
            # transformers tells documents apart only where there is no padding mask.
            numbers = torch.where(padding[:, : self.key_len].bool(), 0, PADDING)
            self._layout = operator.layout(numbers)
        elif self._layout is None and function is not causal_mask_function:
            numbers = document_numbers(
                function, arguments["batch_size"], self.key_len, arguments["device"]
            )
            self._layout = operator.layout(numbers)
        return self._layout


def mask_function(**arguments: Any) -> Any:
    """`sparse_mask`, whatever calls it."""
    if is_compiling() and _is_prefill(arguments):
        return GraphMask(arguments)
    return _mask_outside(**arguments)


def _is_prefill(arguments: dict[str, Any]) -> bool:
    if isinstance(arguments.get("attention_mask"), SparseMask):
        return False
    offset, window = arguments.get("q_offset", 0), arguments.get("local_size")
    if isinstance(offset, Tensor) or offset or arguments.get("kv_offset", 0):
        return False
    return window is None or arguments["q_length"] <= window


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`sparse_attention_forward`, whatever calls it."""
    plan = get_plan(module) if is_compiling() else None
    if (
        plan is None
        or not isinstance(attention_mask, GraphMask)
        or plan.observer is not None
        or kwargs.get("cu_seq_lens_q") is not None
        or tile_queries(module) is not None
        or key.shape[2] != query.shape[2]
    ):
        return _attention_outside(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    refuse_chosen_keys(module, kwargs)
    plan.reading.is_prompt(attention_mask)
    if plan.pattern is None:
        mask = attention_mask.stock(plan.stock)
        return stock_function(module, plan.stock)(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
        )
    refuse_unsupported(module, attention_mask, dropout, kwargs)
    refuse_share_of_heads(module, plan, query.shape[1])
    softmax = own_softmax(kwargs)
    # Graphs run without autocast, so that what it casts is a part of them.
    out = operator.attention(
        *cast_together(query, key, value),
        softmax.sink,
        attention_mask.layout(),
        plan.text,
        module.layer_idx,
        query.shape[3] ** -0.5 if scaling is None else scaling,
        plan.backend,
        softmax.softcap,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, attention_function)
# Without a mask function of the same name transformers would drop the padding mask in silence.
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
