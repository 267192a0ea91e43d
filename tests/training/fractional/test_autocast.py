"""Fractional attention computes in float32 at least, under `torch.autocast` too."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sa_patch.patterns import SA, Pattern
from sa_patch.training.fractional.distance_kernel import DistanceKernel
from sa_patch.training.fractional.models import fractional_model
from tests.training.fractional.test_attention import GEOMETRIES, attend, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("pattern", [None, SA(4)], ids=str)
def test_autocast_changes_nothing(
    pattern: Pattern | None, geometry: str, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(11, kv_heads=4))
    # Near keys, whose distances a matrix product in half precision would lose.
    inputs = [x.detach().requires_grad_() for x in (q, q + 0.15 * k, v)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attend(inputs, 1.2, geometry=geometry, pattern=pattern)
        found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_model_keeps_the_precision_of_its_rotary_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = fractional_model(LlamaForCausalLM(config).eval(), 1.2)
    computed, seen = DistanceKernel.distances, []

    def kept(self: DistanceKernel, q: Tensor, k: Tensor) -> Tensor:
        seen.append((q, k, computed(self, q, k)))
        return seen[-1][2]

    monkeypatch.setattr(DistanceKernel, "distances", kept)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(20)[None])
    (q, k, g), *_ = seen
    # Turned by float32 angles, they are not what half precision holds.
    assert not torch.equal(q, q.bfloat16().float())
    assert torch.allclose(g.double(), computed(DistanceKernel(1.2), q.double(), k.double()))
