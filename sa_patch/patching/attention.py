"""The attention function of a patched model, as transformers' ``AttentionInterface`` calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_patch.errors import UserError
from sa_patch.kernels import PLAIN, Softmax, Spans, attend
from sa_patch.kernels.backend import as_scored
from sa_patch.kernels.inputs import outside_autocast
from sa_patch.patching.mask import Packing, SparseMask
from sa_patch.patching.plan import LayerPlan, Observer, get_plan
from sa_patch.patching.reading import refuse_last_queries, refuse_pieces
from sa_patch.patching.tile_queries import keep_queries, tile_queries, without_earlier

IMPLEMENTATION = "sa_patch"
"""The name under which our attention and mask functions are registered with transformers."""

OWN_NAMES = {IMPLEMENTATION}
"""That name, and those of `sa_patch.patching.implementations`."""

# Arguments by which a model changes its scores or weights; a pattern that ignored them would be
# wrong. Soft caps and learned sinks are not among them: kernels know those.
_OTHER_ARGUMENTS = ("position_bias", "head_mask")

# Arguments by which a model names the keys that it has chosen itself.
_CHOSEN_KEYS = ("indices", "block_indices")


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer.

    Args:
        module: the layer's attention module, which carries its `LayerPlan`.
        query: ``[batch, q_heads, nq, head_dim]``, rotary embeddings applied.
        key, value: ``[batch, kv_heads, n, head_dim]``, cached ones first; a cache that drops what
            the pattern does not reach gives fewer than the mask counts.
        attention_mask: the `SparseMask` of this forward pass.

    Returns:
        ``[batch, nq, q_heads, head_dim]`` and None (no attention weights).

    Raises:
        UserError: if the call asks for something a sparse layer cannot do.
    """
    plan = get_plan(module)
    if plan is None:
        name = getattr(getattr(module, "config", None), "_attn_implementation", IMPLEMENTATION)
        if name != IMPLEMENTATION:
            # The mask function, which patches, was passed over.
            require_own_mask(attention_mask, f"a model under attn_implementation={name!r}")
        raise UserError(
            "this model uses the attention implementation 'sa_patch' without having been patched; "
            "load it with its stock attention and call sa_patch.patch_model(model, ...)"
        )
    require_own_mask(attention_mask, "a patched model")
    refuse_chosen_keys(module, kwargs)
    prompt = plan.reading.is_prompt(attention_mask)
    if plan.pattern is None or (not prompt and plan.decode == "full"):
        keep_queries(module, query, attention_mask)
        stock_mask = attention_mask.stock(plan.stock, kwargs)
        return stock_function(module, plan.stock)(
            module, query, key, value, stock_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    refuse_unsupported(module, attention_mask, dropout, kwargs)
    refuse_share_of_heads(module, plan, query.shape[1])
    if prompt and attention_mask.cached > 0:
        refuse_pieces(plan.pattern, attention_mask.cached)
    refuse_last_queries(plan.pattern, attention_mask, kwargs)
    key, value = key[:, :, : attention_mask.key_len], value[:, :, : attention_mask.key_len]
    if key.shape[2] < attention_mask.key_len:
        # The cache has dropped what lies between the sinks and the window.
        packing = Packing.compact(len(key), key.shape[2], query.shape[2])
    else:
        packing = attention_mask.packing(kwargs)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query = packing.pack(query, packing.query_order)
    key = packing.pack(key, packing.key_order)
    spans, new = packing.spans, query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if plan.observer is not None:
        with outside_autocast(query, key) as (q, k):
            _observe(plan.observer, layer, as_scored(plan.pattern, q, scale), k, spans)
    cache = tile_queries(module) if spans.packed_in is None else None
    earlier: list[int] = []
    if cache is not None:
        query, spans, earlier = cache.begin_tiles(query, spans)
    out = attend(
        plan.pattern,
        query,
        key,
        packing.pack(value, packing.key_order),
        layer=layer,
        spans=spans,
        scale=scale,
        backend=plan.backend,
        softmax=own_softmax(kwargs),
    )
    out = without_earlier(out, earlier, new)
    return packing.unpack(out).transpose(1, 2).contiguous(), None


def _observe(observer: Observer, layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
    """Show an observer the call, documents of packed rows one by one."""
    if spans.packed_in is None:
        observer(layer, q, k, spans)
        return
    for own_q, own_k in spans.sequences(q, k):
        observer(layer, own_q, own_k, Spans((own_k.shape[2],), (0,)))


def own_softmax(arguments: dict[str, Any]) -> Softmax:
    """What the model changes about the softmax, by the names of transformers' interface."""
    softcap, sink = arguments.get("softcap"), arguments.get("s_aux")
    return PLAIN if softcap is None and sink is None else Softmax(softcap, sink)


def stock_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function that the module would have called unpatched."""
    # Each model file has an eager function of its own, which is the interface's default.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


def require_own_mask(mask: object, model: str) -> None:
    """Raise `UserError` for a mask that `sparse_mask` did not make.

    Args:
        model: what kind of model it is, for the sentence.
    """
    if not isinstance(mask, SparseMask):
        raise UserError(
            f"{model} makes its own mask: a ready 4D attention_mask is not supported; "
            "give a 2D one of 0 and 1"
        )


def refuse_chosen_keys(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise `UserError` where the model has chosen keys itself, which even stock masks leave out.

    Model files put that choice into masks only for implementations that they know by name.
    """
    for name in _CHOSEN_KEYS:
        if kwargs.get(name) is not None:
            raise UserError(
                f"layer {module.layer_idx} of this model chooses keys itself ({name!r}), which a "
                "patched model would ignore; unpatch_model(model) first"
            )


def refuse_share_of_heads(module: nn.Module, plan: LayerPlan, heads: int) -> None:
    """Raise `UserError` where a head's own draw would be that of another.

    Under tensor parallelism a module has a share of the heads, and cannot tell which.
    """
    if not plan.draws_by_head:
        return
    every = getattr(getattr(module, "config", None), "num_attention_heads", heads)
    if heads != every:
        raise UserError(
            f"layer {module.layer_idx} has {heads} of {every} heads here, as under tensor "
            f"parallelism, and {plan.text} tells heads apart by their number among all; leave "
            "per_head out, or take one pattern for all heads"
        )


def refuse_unsupported(
    module: nn.Module, mask: SparseMask, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raise `UserError` if a call asks for something a sparse layer cannot do."""
    if mask.refusal is not None:
        raise UserError(f"layer {module.layer_idx}: {mask.refusal}")
    if kwargs.get("output_attentions"):
        raise UserError(
            "output_attentions=True is not supported by a patched model: a sparse layer never "
            "holds the n x n weights; unpatch_model(model) first"
        )
    if dropout:
        raise UserError(
            "attention dropout is not supported by a patched model; call model.eval() or set "
            "attention_dropout to 0"
        )
    for name in _OTHER_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UserError(
                f"layer {module.layer_idx} of this model changes its softmax by {name!r}, which "
                "sparse attention does not support; leave it out with layers=..."
            )
