"""What kernels remember between calls."""

import torch
from torch import Tensor

from sa_patch.kernels.tensor_cache import TensorCache


def test_cache_drops_the_least_recently_used_beyond_its_bytes() -> None:
    cache = TensorCache(limit=1000)

    def build(elements: int) -> tuple[Tensor, ...]:
        return (torch.zeros(elements, dtype=torch.uint8),)

    first = cache.get("a", lambda: build(400))
    cache.get("b", lambda: build(400))
    assert cache.get("a", lambda: build(1))[0] is first[0], "rebuilt though it was held"
    cache.get("c", lambda: build(400))
    assert len(cache) == 2 and cache.bytes == 800
    assert cache.get("a", lambda: build(1))[0] is first[0], "the most recent was dropped"
    assert len(cache.get("b", lambda: build(7))[0]) == 7, "the oldest was kept"
    assert len(cache.get("big", lambda: build(2000))[0]) == 2000
    assert cache.bytes <= 1000


def test_cached_tensors_can_be_trained_through_later() -> None:
    cache = TensorCache(limit=1000)
    with torch.inference_mode():
        (held,) = cache.get("x", lambda: (torch.zeros(3),))
    assert not held.is_inference()


def test_tensors_that_share_their_memory_count_once() -> None:
    cache = TensorCache(limit=1000)
    halves = cache.get("halves", lambda: torch.zeros(600, dtype=torch.uint8).split(300))
    assert len(halves) == 2 and cache.bytes == 600
