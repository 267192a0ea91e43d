"""Distances and weights of fractional attention: accuracy of the one, shape of the other."""

import math

import pytest
import torch

from sa_patch.training.fractional.distance_kernel import DistanceKernel

GEOMETRIES = ("euclidean", "geodesic")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_near_vectors_keep_their_distance_in_float32(geometry: str) -> None:
    """A matrix product alone would lose it: |q|^2 + |k|^2 is a million times larger."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    step = torch.randn(5, 64, generator=generator, dtype=torch.float64) * 1e-3
    q = (k + step).float()
    kernel = DistanceKernel(1.2, geometry)
    wanted = kernel.paired_distances(q.double(), k.float().double())
    found = kernel.distances(q, k.float()).diagonal()
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=0)
    alone = kernel.distances(q[:1], k[:1].float())  # the branch for many near pairs
    assert torch.allclose(alone[0].double(), wanted[:1], rtol=1e-4, atol=0)


def test_angles_are_right_near_zero_and_near_pi() -> None:
    angle = torch.tensor([0.0, 1e-9, 1e-4, 1.0, math.pi - 1e-9, math.pi], dtype=torch.float64)
    turned = torch.stack([angle.cos(), angle.sin()], dim=-1)
    found = DistanceKernel(1.2, "geodesic").paired_distances(
        turned, torch.tensor([[1.0, 0]]).double()
    )
    assert torch.allclose(found, angle, rtol=1e-12, atol=1e-15)


def test_alpha_below_two_does_not_approach_the_form_at_two() -> None:
    """What the definition says: a power law of exponent d + 2 in its limit, and not a Gaussian."""
    g = torch.tensor([0.0, 0.5, 3.0, 40.0], dtype=torch.float64)
    limit = -(6 + 2) * torch.log1p(g)
    for off in (1e-3, 1e-6, 1e-9):
        found = DistanceKernel(2 - off).log_weights(g, 6, 1.0)
        assert torch.allclose(found, limit, rtol=off, atol=1e-12)
    assert torch.equal(DistanceKernel(2).log_weights(g, 6, 1.0), -g.square())
    # Distances jump as well, by 1 / (2^(1/d) - 1).
    ends = torch.eye(2, 6, dtype=torch.float64)
    below, at = (DistanceKernel(a).distances(ends[:1], ends[1:]) for a in (2 - 1e-9, 2))
    assert torch.allclose(at / below, torch.full_like(at, 1 / (2 ** (1 / 6) - 1)))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_smaller_alpha_leaves_far_keys_more(geometry: str) -> None:
    g = torch.tensor([0.1, 3.0], dtype=torch.float64)
    shares = [
        float(DistanceKernel(a, geometry).log_weights(g, 8, 1.0).diff()) for a in (1.0, 1.2, 1.6)
    ]
    assert shares == sorted(shares, reverse=True)
