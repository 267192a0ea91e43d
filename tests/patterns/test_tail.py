"""The dense tail: its budget, how it joins with other patterns, and what a union without it is."""

import pytest
import torch

from sa_patch import SA, SWA, BlockTopK, Full, Sinks, Tail, sparse_attention
from sa_patch.errors import UserError
from sa_patch.patterns import Union, flops_share, parse_pattern, seed_of, split_tail


def test_the_last_queries_see_all_and_the_others_themselves() -> None:
    seen = Tail(3).visible(torch.arange(8), 8)[0]
    assert torch.equal(seen[:5], torch.eye(5, 8, dtype=torch.bool))
    assert torch.equal(seen[5:], torch.ones(3, 8, dtype=torch.bool).tril(5))
    assert Tail(3).keys_per_query(8).tolist() == [1, 1, 1, 1, 1, 6, 7, 8]


def test_a_tail_costs_its_share() -> None:
    n, size = 4096, 64
    alone = flops_share(Sinks(4) | SWA(60), n)
    both = flops_share(Sinks(4) | SWA(60) | Tail(size), n)
    rows = sum(n - i - 64 for i in range(size))
    assert both - alone == pytest.approx(rows / (n * (n + 1) / 2))


def test_of_several_tails_the_longest_stays() -> None:
    one = Tail(5) | Sinks(4) | Tail(9) | SWA(6)
    assert one == parse_pattern("sinks:4+swa:6+tail:9")
    assert isinstance(one, Union) and one.parts == (Sinks(4), SWA(6), Tail(9))
    assert not one.prefix_stable and one.bounded_reach is None and one.effective_window == 10
    assert Full() | Tail(3) == Full()


@pytest.mark.parametrize(
    ("pattern", "rest", "size"),
    [
        (Sinks(4) | SWA(6) | Tail(9), Sinks(4) | SWA(6), 9),
        (SA(8) | Tail(2), SA(8), 2),
        # Sinks do not show a query its own key, which the tail's pattern does.
        (Sinks(4) | Tail(3), Sinks(4) | SWA(1), 3),
        (Tail(7), SWA(1), 7),
        (SWA(5), SWA(5), 0),
    ],
    ids=str,
)
def test_the_rest_beside_a_tail(pattern: object, rest: object, size: int) -> None:
    assert split_tail(pattern) == (rest, size)


@pytest.mark.parametrize("backend", ["reference", "banded"])
def test_one_long_tail_is_full_attention(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 150, 8, generator=generator) for heads in (4, 2, 2))
    lengths = torch.tensor([150, 90])
    full = sparse_attention(q, k, v, Full(), lengths=lengths, backend=backend)
    pattern = BlockTopK(4, 2) | Tail(149)
    assert pattern.saturated(150) and not (BlockTopK(4, 2) | Tail(90)).saturated(150)
    out = sparse_attention(q, k, v, pattern, lengths=lengths, backend=backend)
    torch.testing.assert_close(out, full, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        *(("tail:64+swa:100", 164), ("tail:64+psa:100", 164), ("sinks:4+swa:90+tail:64", 158)),
        *(("tail:64+moba:64,2", 192), ("power:4+tail:9", 14), ("sinks:4+tail:9", 14)),
        # The slots of SA are those of the whole prompt.
        *(("tail:64+sa:30", 65), ("sa:40+tail:9", 79)),
    ],
)
def test_saturated_means_that_every_query_sees_all(text: str, longest: int) -> None:
    pattern = parse_pattern(text)
    lengths = [n for n in range(1, 220) if pattern.saturated(n)]
    assert lengths == list(range(1, longest + 1))
    q, k = (torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    for n in (longest, longest + 1):
        seen = pattern.visible(torch.arange(n), n, q=q[:, :n], k=k[:, :n])
        dense = bool((seen.sum(-1) == torch.arange(1, n + 1)).all())
        # One draw may happen to hide nothing.
        assert dense == (n == longest) or (dense and seed_of(pattern) is not None)


@pytest.mark.parametrize("queries", [1, 20, 64, 100])
def test_queries_behind_cached_keys_have_the_tail_too(queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, 200, 8, generator=generator) for _ in range(2))
    pattern = Sinks(2) | SWA(9) | Tail(40)
    lengths = torch.tensor([200, 130])
    out, expected = (
        sparse_attention(q, k, v, pattern, lengths=lengths, backend=backend)
        for backend in ("banded", "reference")
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_a_size_is_a_whole_number(size: object) -> None:
    with pytest.raises(UserError, match="size must be a whole number of at least 1"):
        Tail(size)  # type: ignore[arg-type]
