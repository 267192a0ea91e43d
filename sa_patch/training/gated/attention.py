"""Gated stochastic and sliding-window attention: two sparse branches over one q, k and v.

After *Stochastic Attention* (Jin & Sui, arXiv 2604.00754), whose models trained from scratch join
the two: the window brings what is near, the permutation what is far, and a gate for each branch
and head says how much of either a token takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sa_patch.kernels import attend
from sa_patch.patching.mask import sparse_mask
from sa_patch.patterns import SA, SWA, Pattern
from sa_patch.training.packed_call import packed_call

IMPLEMENTATION = "sa_patch_gated"
"""The name under which the gated attention is registered with transformers."""


class GatedSA(nn.Module):
    """Mixed into an attention module of transformers: ``g_sa * SA + g_swa * SWA``.

    Both branches share the module's projections and rotary embeddings. The gates are sigmoids of
    one affine map of the module's input (which in Llama and Qwen3 is the layer's input after its
    norm), one for each branch and query head, independent of each other: both may be open, or
    neither. A new model's gates stand near 1/2.

    The configuration gives `sa_window`, `swa_window`, `sa_seed`, `sa_circular` and
    `attention_backend`.

    Attributes:
        gate_proj: ``[hidden] -> [2 * q_heads]``, the gates of SA before those of SWA.
    """

    # What the classes of transformers bring along.
    config: Any
    layer_idx: int

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, 2 * config.num_attention_heads, bias=True)

    def gates(self, hidden_states: Tensor) -> Tensor:
        """Of ``hidden_states [batch, n, hidden]``: ``[2, batch, q_heads, n]``, in (0, 1)."""
        opened = torch.sigmoid(self.gate_proj(hidden_states))
        return opened.unflatten(-1, (2, -1)).permute(2, 0, 3, 1)

    @property
    def branches(self) -> tuple[Pattern, Pattern]:
        """The patterns of evaluation, SA before SWA."""
        return self.branches_at(self.config.sa_seed)

    def branches_at(self, seed: int) -> tuple[Pattern, Pattern]:
        """The same with the permutations of another seed."""
        config = self.config
        sa = SA(config.sa_window, seed=seed, circular=config.sa_circular)
        return sa, SWA(config.swa_window)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the class of transformers, which hands the gates on to `gated_attention_forward`."""
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

    With cached keys both patterns go on over the whole sequence. The window is prefix-stable;
    stochastic attention redraws its permutation as the sequence grows, so a token that is decoded
    sees what it would see as the last one of a prompt.

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
    packing, query, key, value = packed_call(
        module,
        (query, key, value),
        attention_mask,
        dropout,
        kwargs,
        "a model with gated attention",
    )
    seed = module.config.sa_seed if permutation_seed is None else permutation_seed
    joined: Tensor | None = None
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
        joined = weighted if joined is None else joined + weighted
    assert joined is not None
    return joined.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, gated_attention_forward)
# Without a mask function of the same name transformers would drop the padding mask in silence.
AttentionMaskInterface.register(IMPLEMENTATION, sparse_mask)
