"""Random inputs for the laws: shapes, lengths and numbers.

Hypothesis draws the shape of a case and a seed; the numbers themselves come from that seed, so
that an example is small to print and quick to shrink.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels import BACKENDS, sparse_attention
from sa_patch.patterns import Pattern
from tests import oracle
from tests.laws.drawn import oracle_arguments
from tests.thorough import unless_thorough

# `auto` takes one of the others, as test_backends shows; that the laws hold of it too is checked
# under `thorough`.
AUTO = unless_thorough((), ("auto",))
BACKEND_NAMES: tuple[str, ...] = (*BACKENDS, *AUTO)
# Triton's interpreter takes a second for what a kernel does in microseconds.
SLOW_BACKENDS = frozenset({"triton"})
# What the laws of whole models run on; tests/patching/test_fused_backends.py has the others.
MODEL_BACKENDS: tuple[str, ...] = ("reference", "banded", *AUTO)


@dataclass
class Case:
    """q: [batch, q_heads, n, head_dim]; k, v: [batch, kv_heads, n, head_dim]; lengths: [batch]."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor | None
    layer: int = 0
    scale: float | None = None

    @property
    def seq_len(self) -> int:
        return self.q.shape[2]

    def real_tokens(self) -> list[int]:
        """Number of real tokens of each row."""
        if self.lengths is None:
            return [self.seq_len] * self.q.shape[0]
        return [int(length) for length in self.lengths]

    def with_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> "Case":
        """This case with other numbers."""
        return replace(self, q=q, k=k, v=v)

    def run(self, pattern: Pattern, backend: str) -> Tensor:
        """`sparse_attention` on this case: [batch, q_heads, n, head_dim]."""
        return sparse_attention(
            self.q,
            self.k,
            self.v,
            pattern,
            layer=self.layer,
            lengths=self.lengths,
            scale=self.scale,
            backend=backend,
        )

    def oracle(self, pattern: Pattern) -> oracle.OracleResult:
        """The float64 oracle on this case."""
        return oracle.attention(
            self.q.double().numpy(),
            self.k.double().numpy(),
            self.v.double().numpy(),
            pattern.name,
            lengths=self.real_tokens(),
            scale=self.scale,
            **oracle_arguments(pattern, self.layer),
        )


def make_case(
    *,
    batch: int = 1,
    q_heads: int = 4,
    kv_heads: int = 2,
    seq_len: int,
    head_dim: int = 8,
    lengths: list[int] | None = None,
    layer: int = 0,
    scale: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    poison: bool = True,
) -> Case:
    """Random q, k and v; where `lengths` is given, padding holds NaN unless `poison` is off."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(heads: int) -> Tensor:
        return torch.randn(batch, heads, seq_len, head_dim, generator=generator)

    q, k, v = numbers(q_heads), numbers(kv_heads), numbers(kv_heads)
    if lengths is not None and poison:
        for row, length in enumerate(lengths):
            for tensor in (q, k, v):
                tensor[row, :, length:] = torch.nan
    return Case(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        None if lengths is None else torch.tensor(lengths),
        layer,
        scale,
    )


@st.composite
def cases(
    draw: st.DrawFn,
    min_len: int = 1,
    max_len: int = 40,
    ragged: bool | None = None,
) -> Case:
    """A random case; `ragged` decides whether rows have lengths of their own (None: at random)."""
    kv_heads = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    seq_len = draw(st.integers(min_len, max_len))
    lengths = None
    if draw(st.booleans()) if ragged is None else ragged:
        shorter = st.lists(st.integers(1, seq_len), min_size=batch - 1, max_size=batch - 1)
        lengths = [*draw(shorter), seq_len]
    return make_case(
        batch=batch,
        q_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        seq_len=seq_len,
        head_dim=draw(st.sampled_from([1, 4, 6, 8, 16])),
        lengths=lengths,
        layer=draw(st.integers(0, 40)),
        scale=draw(st.sampled_from([None, None, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**20)),
    )


def affordable(backend: str, data: st.DataObject) -> bool:
    """Whether to run this example: slow backends take a quarter of them, the simplest included."""
    return backend not in SLOW_BACKENDS or data.draw(st.integers(0, 3)) == 0


def in_turns(patterns: Sequence[Pattern], backend: str, turn: int) -> Sequence[Pattern]:
    """All patterns, or for slow backends every third: three successive turns have them all."""
    return patterns[turn % 3 :: 3] if backend in SLOW_BACKENDS else patterns


def serves(backend: str, pattern: Pattern, case: Case, gradients: bool = False) -> bool:
    """Whether `backend` can serve the case; one that cannot must refuse, and give its reason."""
    if backend == "auto":
        return True
    if gradients:
        case = case.with_tensors(*(x.clone().requires_grad_() for x in (case.q, case.k, case.v)))
    able, reason = BACKENDS[backend].supports(pattern, case.q, case.k)
    if not able:
        assert reason, f"{backend} refuses {pattern} without a reason"
        try:
            case.run(pattern, backend)
        except UserError as error:
            assert reason in str(error), f"{backend} hides its reason: {error}"
        else:
            raise AssertionError(f"{backend} said it cannot serve {pattern}, and then ran it")
    return bool(able)


# Keys whose weights one call reads off.
PROBE_WIDTH = 32


def visible_sets(pattern: Pattern, case: Case, backend: str) -> Tensor:
    """The visible sets a backend really used, read off its output: bool [batch, q_heads, n, n].

    With the unit vectors as values, the output of query i is its row of attention weights, and a
    weight is positive exactly where the key entered the softmax. Values are as wide as the heads,
    so these are widened with zeros, which change no score, and calls take slices of the keys.
    """
    batch, _, n, head_dim = case.q.shape
    scale = head_dim**-0.5 if case.scale is None else case.scale
    width = max(head_dim, PROBE_WIDTH)
    q, k = (torch.nn.functional.pad(x, (0, width - head_dim)) for x in (case.q, case.k))
    rows = []
    for start in range(0, n, width):
        v = torch.zeros(batch, k.shape[1], n, width)
        for offset in range(min(width, n - start)):
            v[:, :, start + offset, offset] = 1.0
        probe = Case(q, k, v, case.lengths, case.layer, scale)
        rows.append(probe.run(pattern, backend) > 0)
    return torch.cat(rows, dim=-1)[..., :n]
