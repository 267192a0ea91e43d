"""Law 4 on sequences of several blocks: every backend equals `reference`, which test_backends holds
against the oracle.
"""

import pytest

from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks
from tests.laws.strategies import BACKEND_NAMES, make_case, serves
from tests.thorough import THOROUGH

FP32_TOLERANCE = 1e-5  # absolute

LONG_PATTERNS = [
    Full(),
    SWA(1),
    SWA(300),
    SA(1),
    SA(200, seed=1),
    SA(90, circular=False),
    SA(30, per_head=True),
    # Several tiles to a block, which differ from head to head in the keys they need.
    SA(150, per_head=True),
    MoBA(1, 3),
    MoBA(37, 4),
    MoBA(128, 2),
    Sinks(4),
    PSA(1),
    PSA(60, seed=1),
    PSA(20, per_head=True),
    BlockTopK(4, 8),
    BlockTopK(16, 3, branch=0, grouped=True),
    Sinks(4) | SWA(60),
    Sinks(4) | SWA(30) | SA(30),
    SWA(1) | PSA(40) | SA(20, circular=False, per_head=True),
    Sinks(4) | SWA(20) | MoBA(16, 4),
    Sinks(20) | PSA(20) | BlockTopK(8, 4, branch=4, beam=2) | MoBA(37, 3),
]
# One of each kind.
FEW_LONG = (
    *(Full(), SWA(300), SA(90, circular=False), SA(150, per_head=True), MoBA(37, 4), MoBA(128, 2)),
    *(PSA(60, seed=1), BlockTopK(4, 8), Sinks(4) | SWA(30) | SA(30), LONG_PATTERNS[-1]),
)
LONG_CALLS = [
    pytest.param(pattern, lengths, backend, id=f"{pattern}-{lengths}-{backend}")
    for pattern in LONG_PATTERNS
    for lengths in (None, [1000, 700])
    for backend in BACKEND_NAMES
    if backend != "reference"
    # Triton and flex take all rows at once, one as long as the row alone; `auto` is one of others.
    if THOROUGH or backend == "banded" or (lengths and (pattern in FEW_LONG or backend == "flex"))
]


@pytest.mark.parametrize("pattern, lengths, backend", LONG_CALLS)
def test_backend_equals_reference_on_long_sequences(
    pattern: Pattern, lengths: list[int] | None, backend: str
) -> None:
    """Long enough for several blocks of queries, and not a multiple of any block."""
    seq_len = 1000
    if backend == "triton":
        seq_len, lengths = 600, lengths and [600, 411]
    batch = 1 if lengths is None else len(lengths)
    case = make_case(batch=batch, seq_len=seq_len, lengths=lengths, layer=3)
    if serves(backend, pattern, case):
        difference = (case.run(pattern, backend) - case.run(pattern, "reference")).abs().amax(-1)
        # fp32 scores of blocks that tie may round differently in products of other shapes.
        undecided = (difference > FP32_TOLERANCE).float().mean()
        assert undecided <= (1e-3 if pattern.reads_content else 0)
