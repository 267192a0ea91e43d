"""FlexAttention on CPUs at head_dims that no published model has, but tests do."""

import pytest
import torch

from sa_patch.kernels import sparse_attention
from sa_patch.patterns import SWA, Full, Pattern


def _leave_nan_behind() -> None:
    """Fill and free memory of many sizes, for whoever reads what it has not written."""
    for size in (1 << power for power in range(6, 19, 2)):
        filled = [torch.full((size,), torch.nan) for _ in range(20)]
        del filled


@pytest.mark.parametrize("pattern", [Full(), SWA(3)], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("n", [8, 24, 40, 56])
def test_nothing_is_read_that_was_not_written(n: int, head_dim: int, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(1, 4, n, head_dim, generator=generator)
    k, v = (torch.randn(1, 2, n, head_dim, generator=generator) for _ in range(2))
    expected = sparse_attention(q, k, v, pattern, backend="reference")
    for _ in range(3):
        _leave_nan_behind()
        out = sparse_attention(q, k, v, pattern, backend="flex")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
