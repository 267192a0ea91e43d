"""Gated stochastic and sliding-window attention: two sparse branches over one q, k and v.

After *Stochastic Attention* (Jin & Sui, arXiv 2604.00754), whose models trained from scratch
combine the two: the sliding window attends to near keys, the permutation to far ones, and a gate
for each branch and head weighs them for every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sa_patch.kernels import attend
from sa_patch.patterns import SA, SWA, Pattern
from sa_patch.training.own_attention import pack_inputs, register_attention

IMPLEMENTATION = "sa_patch_gated"
"""The name under which the gated attention is registered with transformers."""


class GatedSA(nn.Module):
    """Mixin for an attention module of transformers: ``g_sa * SA + g_swa * SWA``.

    Both branches share the module's projections and rotary embeddings. Each branch and query head
    has a gate, the sigmoid of an affine map of the module's input (in Llama and Qwen3 the layer's
    input after its norm). The gates are independent: both may be near 1, or near 0. Those of a new
    model are near 1/2.

    The configuration gives `sa_window`, `swa_window`, `sa_seed`, `sa_circular` and
    `attention_backend`.

    Attributes:
        gate_proj: ``[hidden] -> [2 * q_heads]``, the gates of SA before those of SWA.
    """

    # Set by the classes of transformers.
    config: Any
    layer_idx: int

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, 2 * config.num_attention_heads, bias=True)

    def gates(self, hidden_states: Tensor) -> Tensor:
        """Of ``hidden_states [batch, n, hidden]``: ``[2, batch, q_heads, n]``, in (0, 1)."""
        gates = torch.sigmoid(self.gate_proj(hidden_states))
        return gates.unflatten(-1, (2, -1)).permute(2, 0, 3, 1)

    @property
    def branches(self) -> tuple[Pattern, Pattern]:
        """The patterns in evaluation, SA before SWA."""
        return self.branches_at(self.config.sa_seed)

    def branches_at(self, seed: int) -> tuple[Pattern, Pattern]:
        """`branches` with the permutations of another seed."""
        config = self.config
        sa = SA(config.sa_window, seed=seed, circular=config.sa_circular)
        return sa, SWA(config.swa_window)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in transformers' class, which passes the gates to `gated_attention_forward`."""
        gates = self.gates(hidden_states)
        return super().forward(hidden_states, *args, gates=gates, **kwargs)


class LlamaGatedSA(GatedSA, LlamaAttention):
    """`GatedSA` with Llama's projections."""


class Qwen3GatedSA(GatedSA, Qwen3Attention):
    """`GatedSA` with Qwen3's projections and norms of q and k."""


def gated_attention_forward(
    module: GatedSA,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    gates: Tensor,
    permutation_seed: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' ``AttentionInterface`` calls it.

    With cached keys both patterns cover the whole sequence. The window is prefix-stable;
    stochastic attention draws a new permutation as the sequence grows, so a decoded token sees what
    it would see as the last token of a prompt.

    Args:
        query: ``[batch, q_heads, nq, head_dim]``, rotary embeddings applied.
        key, value: ``[batch, kv_heads, n, head_dim]``, cached ones first.
        attention_mask: the `SparseMask` of this forward pass, or None for no padding and no
            cached keys.
        gates: ``[2, batch, q_heads, nq]``, SA before SWA.
        permutation_seed: of the permutations of this pass; the configuration's by default.

    Returns:
        ``[batch, nq, q_heads, head_dim]``, zero at padding, and None.

    Raises:
        UserError: if the call asks for something a sparse layer cannot do.
    """
    packing, query, key, value = pack_inputs(
        module, (query, key, value), attention_mask, dropout, kwargs, "gated"
    )
    seed = module.config.sa_seed if permutation_seed is None else permutation_seed
    total: Tensor | None = None
    for pattern, gate in zip(module.branches_at(seed), gates, strict=True):
        branch = attend(
            pattern,
            query,
            key,
            value,
            layer=module.layer_idx,
            spans=packing.spans,
            scale=query.shape[3] ** -0.5 if scaling is None else scaling,
            backend=module.config.attention_backend,
        )
        weighted = packing.unpack(branch) * gate[..., None]
        total = weighted if total is None else total + weighted
    assert total is not None
    return total.transpose(1, 2).contiguous(), None


register_attention(IMPLEMENTATION, gated_attention_forward)
