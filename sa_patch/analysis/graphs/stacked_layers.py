"""The undirected graph of one layer, or of several layers laid on top of each other."""

from __future__ import annotations

from collections.abc import Iterator

from scipy import sparse

from sa_patch.analysis.graphs.content_choices import random_content
from sa_patch.analysis.graphs.visibility import (
    MAX_PAIRS,
    check_visibility,
    expected_pairs,
    undirected,
    visibility,
)
from sa_patch.errors import UserError
from sa_patch.patterns import Pattern, seed_of
from sa_patch.patterns.base import whole_number


def differs_by_layer(pattern: Pattern) -> bool:
    """Whether a pattern's visible sets are drawn or chosen anew in each layer."""
    return pattern.reads_content or seed_of(pattern) is not None


def layer_matrix(
    pattern: Pattern, seq_len: int, layer: int, *, causal: bool = True, seed: int = 0
) -> sparse.csr_array:
    """`visibility` with random queries and keys, of that seed, where a pattern reads them."""
    content = random_content(seq_len, layer, seed) if pattern.reads_content else None
    return visibility(pattern, seq_len, layer=layer, causal=causal, content=content)


def check_stack(pattern: Pattern, seq_len: int, layers: int) -> None:
    """Refuse what `stacked_graphs` could not build, before anything slow.

    Raises:
        UserError: for numbers out of range, or more pairs than are held in memory.
    """
    check_visibility(pattern, seq_len)
    whole_number(layers, "layers", 1)
    distinct = layers if differs_by_layer(pattern) else 1
    pairs = 2 * distinct * expected_pairs(pattern, seq_len)
    # Pairs of several layers coincide, so that no more than all of them are held.
    if min(pairs, seq_len**2) > MAX_PAIRS:
        raise UserError(
            f"{layers} layers of {pattern} join about {pairs:.2g} pairs at n = {seq_len:,}, more "
            f"than the {MAX_PAIRS:.2g} that are held in memory; take fewer layers or a smaller n"
        )


def stacked_graphs(
    pattern: Pattern, seq_len: int, layers: int, *, seed: int = 0
) -> Iterator[sparse.csr_array]:
    """The graphs of the first 1, 2, ... `layers` layers laid on top of each other.

    Tokens are joined if one sees the other in any of them.

    Args:
        seed: of the random queries and keys of patterns that choose by content.

    Yields:
        bool ``[n, n]``, symmetric, with an empty diagonal; the same object again where a layer
        adds nothing, as where all layers see alike.

    Raises:
        UserError: see `check_stack`.
    """
    check_stack(pattern, seq_len, layers)
    graph = undirected(layer_matrix(pattern, seq_len, 0, seed=seed))
    yield graph
    for layer in range(1, layers):
        if differs_by_layer(pattern):
            graph = graph + undirected(layer_matrix(pattern, seq_len, layer, seed=seed))
        yield graph
