"""Seeds of numpy's and torch's random generators. Patterns draw by hashes and take any integer."""

from __future__ import annotations

from sa_patch.errors import UserError

_BEYOND = 1 << 32


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        UserError: unless it is a whole number from 0 to 2^32 - 1, which every generator takes.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _BEYOND:
        raise UserError(f"a seed must be a whole number from 0 to {_BEYOND - 1}, got {seed!r}")
    return seed
