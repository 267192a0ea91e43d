"""Law 7: no backend but `reference` allocates anything of size n x n.

Two instruments: the profiler's record of every real allocation, and every tensor that any operator
returned. Sequences are long enough that n x n dwarfs what O(n w) work may need.

Seen red when `banded` made its block of queries the whole sequence, `auto` took `reference` at any
length, MoBA gathered all queries at once, and a patched model built the stock mask as well.
"""

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sa_patch import patch_model
from sa_patch.kernels import BACKENDS
from sa_patch.kernels.triton import tiles
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, Tail, parts_of
from tests.laws.strategies import make_case, serves
from tests.small_models import random_tokens, tiny_model
from tests.thorough import THOROUGH, unless_thorough

N = 4096
# FlashAttention runs on GPUs only.
FREE_OF_SQUARES = (*(name for name in BACKENDS if name not in ("reference", "flash")), "auto")
NARROW_PATTERNS = [
    Full(),
    SWA(16),
    SA(16),
    SA(16, circular=False),
    SA(16, per_head=True),
    MoBA(16, 2),
    MoBA(16, 4),
    PSA(16),
    PSA(16, per_head=True),
    BlockTopK(16, 2),
    Sinks(4) | SWA(16),
    Sinks(4) | SWA(16) | Tail(16),
    Sinks(4) | SWA(8) | SA(8) | PSA(8) | MoBA(16, 2),
]
# For Triton's interpreter one of each kind; flex has one mask for all, compiled for seconds. On the
# CPU `auto` takes one of the other backends.
FEW_PATTERNS = {
    "triton": [SWA(16), SA(16, per_head=True), BlockTopK(16, 2), NARROW_PATTERNS[-1]],
    "flex": unless_thorough([SA(16)], NARROW_PATTERNS),
    "banded": unless_thorough(NARROW_PATTERNS[1::2] + NARROW_PATTERNS[-1:], NARROW_PATTERNS),
    "auto": unless_thorough([SA(16), NARROW_PATTERNS[-1]], NARROW_PATTERNS),
}
NARROW_CALLS = [
    pytest.param(pattern, backend, id=f"{pattern}-{backend}")
    for pattern in NARROW_PATTERNS
    for backend in FREE_OF_SQUARES
    if pattern in FEW_PATTERNS.get(backend, NARROW_PATTERNS)
]
SERVED_IN_BATCHES = [
    *(SWA(16), SA(16), MoBA(16, 2), SWA(8) | Tail(16)),
    Sinks(4) | SWA(8) | PSA(8) | BlockTopK(4, 2),
]
BATCHED_CALLS = [
    pytest.param(pattern, backend, id=f"{pattern}-{backend}")
    for pattern in SERVED_IN_BATCHES
    for backend in FREE_OF_SQUARES
    if THOROUGH
    or backend == "banded"
    or (backend == "triton" and pattern in SERVED_IN_BATCHES[2:4])
]


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """These laws are of one layer; `triton` plans all layers of a model at its first, in one piece
    of memory, and a deep model may have been patched by a test before."""
    monkeypatch.setattr(tiles, "_expected_layers", 1)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operator returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What compiled code allocates inside is left to the other instrument."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A sparse tensor holds others, which operators returned before it.
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, stored)
        return result


def allocations(run: Any) -> tuple[int, int]:
    """Largest single allocation, and peak of live memory above the start, in bytes."""
    # Garbage of earlier calls that is freed while this one is watched would be taken for its own.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return largest, peak


def long_enough(pattern: Pattern, backend: str) -> int:
    """Tokens of a call; Triton's interpreter is given a half or a quarter."""
    if backend != "triton":
        return N
    return N // (2 if any(isinstance(part, BlockTopK) for part in parts_of(pattern)) else 4)


def kernel_call(pattern: Pattern, backend: str, n: int, **shape: Any) -> Any:
    shape |= {} if backend == "flex" else {"q_heads": 2, "kv_heads": 1, "head_dim": 4}
    case = make_case(seq_len=n, **shape)
    assert serves(backend, pattern, case)
    return lambda: case.run(pattern, backend)


@pytest.mark.parametrize("pattern, backend", NARROW_CALLS)
def test_no_allocation_is_of_size_n_squared_and_memory_grows_as_n(
    pattern: Pattern, backend: str
) -> None:
    n = long_enough(pattern, backend)
    short, long = (kernel_call(pattern, backend, tokens) for tokens in (n // 2, n))
    # What is compiled is compiled here, and may not be while a dispatch mode is active.
    short()
    with LargestTensor() as seen:
        long()
    (largest, peak), (most, in_all) = allocations(short), allocations(long)
    assert seen.elements < n * n / 2
    assert most < 2 * n * n, "half a square of floats"
    assert in_all < 4 * n * n, "several arrays that only together amount to n x n floats"
    assert in_all <= 2.5 * peak and most <= 2.5 * largest


@pytest.mark.parametrize("pattern, backend", BATCHED_CALLS)
def test_ragged_batches_allocate_no_square_either(pattern: Pattern, backend: str) -> None:
    n = long_enough(pattern, backend)
    run = kernel_call(pattern, backend, n, batch=2, lengths=[n * 3 // 4, n])
    with LargestTensor() as seen:
        run()
    assert seen.elements < n * n / 2
    assert allocations(run)[0] < 2 * n * n, "half a square of floats"


@pytest.mark.parametrize("backend", ["banded", "auto"])
@pytest.mark.parametrize("pattern", SERVED_IN_BATCHES, ids=str)
def test_a_model_with_a_padding_mask_allocates_no_square(pattern: Pattern, backend: str) -> None:
    """transformers would build an n x n mask for its own attention."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=N)
    patch_model(model, pattern, backend=backend)
    tokens = random_tokens(1, N)
    mask = torch.ones_like(tokens)
    mask[:, :100] = 0

    @torch.no_grad()
    def run() -> Any:
        return model(tokens, attention_mask=mask, logits_to_keep=1).logits

    with LargestTensor() as seen:
        run()
    assert seen.elements < N * N / 2


def test_the_instruments_see_the_square_that_reference_allocates() -> None:
    run = kernel_call(SWA(16), "reference", N)
    with LargestTensor() as seen:
        run()
    largest, peak = allocations(run)
    assert min(seen.elements, largest, peak) >= N * N
