"""The methods of `sa_patch.patterns.rivals` written a second time, from their papers.

As in `tests/oracle.py` everything is float64, NumPy and plain loops, and nothing comes from
`sa_patch`. A function takes the queries of one head, its keys and the method's own parameters, and
returns what every query sees, with the margin by which its choice was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.rival_oracle.blocks import permuted_blocks, skip_softmax, xattention
from tests.rival_oracle.lines import flexprefill, power, vertical_slash
from tests.rival_oracle.means import flashprefill, prism, sparge
from tests.rival_oracle.shared import Floats, Seen

METHODS: dict[str, Callable[..., Seen]] = {
    "power": power,
    "vertical_slash": vertical_slash,
    "xattention": xattention,
    "skip_softmax": skip_softmax,
    "flexprefill": flexprefill,
    "sparge": sparge,
    "permuted_blocks": permuted_blocks,
    "prism": prism,
    "flashprefill": flashprefill,
}


def visible(method: str, queries: Floats, keys: Floats, arguments: dict[str, Any]) -> Seen:
    """queries: [n, head_dim] of one head; keys: [n, head_dim]."""
    seen = METHODS[method](queries, keys, **arguments)
    for i, own in enumerate(seen.keys):
        assert own and max(own) <= i, "the oracle itself looks ahead"
    return seen
