"""Tiles of shared choices behind a cache: in pieces, cropped, reordered, or refused."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from sa_patch import patch_model, sparse_attention, unpatch_model
from sa_patch.errors import UserError
from sa_patch.kernels import Spans
from sa_patch.patching import tile_queries
from sa_patch.patching.tile_queries import TileQueriesLayer, without_earlier
from sa_patch.patterns import BlockTopK, MoBA, Pattern, Sinks
from tests.small_models import random_tokens, tiny_model

PATTERN = BlockTopK(2, 2, 2, 0, branch=0, shared=8, segment=8)
TOLERANCE = 1e-4


def patched_model(pattern: Pattern = PATTERN):  # type: ignore[no-untyped-def]
    return patch_model(tiny_model("llama"), pattern, decode="pattern")


@pytest.mark.parametrize("pattern", [PATTERN, Sinks(2) | MoBA(3, 2, shared=8)], ids=str)
@torch.no_grad()
def test_tokens_that_were_taken_back_leave_no_trace(pattern: Pattern) -> None:
    model = patched_model(pattern)
    tokens = random_tokens(1, 45)
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    model(tokens[:, :30], past_key_values=cache)
    # A draft of other tokens, refused: back behind the start of a tile, at 24.
    model(random_tokens(1, 9, seed=5), past_key_values=cache)
    cache.crop(-9)
    cache.crop(-8)
    rest = model(tokens[:, 22:], past_key_values=cache).logits
    assert (rest - whole[:, 22:]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_rows_go_on_where_beams_put_them() -> None:
    model = patched_model()
    tokens = random_tokens(2, 30)
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    model(tokens[:, :21], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = model(tokens[[1, 0], 21:], past_key_values=cache).logits
    assert (rest - whole[[1, 0], 21:]).abs().max() <= TOLERANCE
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    more = random_tokens(1, 5, seed=3)
    expected = model(torch.cat([tokens[:1], more], 1)).logits[:, 30:]
    found = model(more.repeat(2, 1), past_key_values=cache).logits
    assert (found - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_tile_that_nobody_kept_is_refused() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1, 20)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :11], past_key_values=cache)
    patch_model(model, PATTERN, decode="pattern")
    with pytest.raises(UserError, match="start with a new cache after patching"):
        model(tokens[:, 11:], past_key_values=cache)
    unpatch_model(model)


@torch.no_grad()
def test_behind_other_caches_pieces_begin_with_a_tile() -> None:
    model = patched_model()
    tokens = random_tokens(1, 30)
    whole = model(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens[:, :16], past_key_values=cache)
    rest = model(tokens[:, 16:27], past_key_values=cache).logits
    assert (rest - whole[:, 16:27]).abs().max() <= TOLERANCE
    with pytest.raises(UserError, match="must begin a tile"):
        model(tokens[:, 27:], past_key_values=cache)


def test_the_functional_face_takes_whole_tiles() -> None:
    q, k = torch.randn(1, 4, 13, 8), torch.randn(1, 2, 29, 8)
    whole = sparse_attention(torch.cat([torch.randn(1, 4, 16, 8), q], 2), k, k, PATTERN)
    assert torch.allclose(sparse_attention(q, k, k, PATTERN), whole[:, :, 16:], atol=1e-5)
    with pytest.raises(UserError, match="must begin a tile, at a multiple of 8; got position 17"):
        sparse_attention(q[:, :, :12], k, k, PATTERN)


class Operations(TorchDispatchMode):
    """The operations on tensors, and the most columns of a result that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.most_columns = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        viewed = func.name() in ("aten::slice.Tensor", "aten::alias")
        if isinstance(found, torch.Tensor) and found.dim() == 4 and not viewed:
            self.most_columns = max(self.most_columns, found.shape[2])
        return found


def test_rows_alike_are_kept_by_slices_and_no_prompt_is_copied() -> None:
    """An index made of numbers would be copied to a GPU, which waits, in every layer."""
    layer = TileQueriesLayer(8)
    q = torch.randn(2, 3, 520, 4)
    with Operations() as operations:
        layer.begin_tiles(q[:, :, :500], Spans((500, 500), (0, 0)))
        kept = layer.queries
        # Generated tokens, and the results of the tile that they continue.
        for end in range(501, 521):
            longer, spans, earlier = layer.begin_tiles(
                q[:, :, end - 1 : end], Spans((end, end), (end - 1, end - 1))
            )
            last = without_earlier(longer, earlier, 1)
            assert spans.starts == ((end - 1) // 8 * 8,) * 2
    views = {"aten::slice.Tensor", "aten::alias"}
    assert operations.names <= views | {"aten::cat", "aten::new_zeros"}
    assert operations.most_columns <= 2 * layer._kept
    assert kept is not None and torch.equal(kept, q[:, :, 500 - layer._kept : 500])
    assert torch.equal(longer, q[:, :, 512:520]) and torch.equal(last, q[:, :, 519:])


def test_rows_that_differ_are_told_by_pinned_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[list[int]] = []

    def copy(table: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied.append(table.tolist())
        return table.to(device)

    monkeypatch.setattr(tile_queries, "on_device", copy)
    layer = TileQueriesLayer(8)
    q = torch.randn(2, 3, 200, 4)
    layer.begin_tiles(q, Spans((200, 170), (0, 0)))
    assert copied == [[200 - 170 + layer._kept, layer._kept]] and layer.queries is not None
    for row, length in enumerate((200, 170)):
        assert torch.equal(layer.queries[row], q[row, :, length - layer._kept : length])


@torch.no_grad()
def test_a_model_does_not_keep_a_cache_alive() -> None:
    model = patched_model()
    cache = DynamicCache(config=model.config)
    model(random_tokens(1, 30), past_key_values=cache)
    (module, *_) = (m for m in model.modules() if tile_queries.tile_queries(m) is not None)
    assert tile_queries.tile_queries(pickle.loads(pickle.dumps(module))) is None
    held = weakref.ref(cache.layers[0].keys)
    del cache
    gc.collect()
    assert held() is None
