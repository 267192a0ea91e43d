"""Adapters that put keys into the cache before the prompt, as prefix tuning does."""

from __future__ import annotations

from collections.abc import Iterable

from sa_patch.errors import UserError
from sa_patch.patching.layers import wrappers
from sa_patch.patterns import Pattern

# PEFT's adapters that put keys and values into the cache.
_PREFIX_TYPES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


def refuse_prefix_adapter(model: object, patterns: Iterable[Pattern | None]) -> None:
    """Raise `UserError` if an active adapter's keys come before prompts that must be whole."""
    unstable = [p for p in patterns if p is not None and not p.prefix_stable]
    for wrapper in wrappers(model):
        config = getattr(wrapper, "active_peft_config", None)
        kind = str(getattr(getattr(config, "peft_type", None), "value", None))
        if unstable and kind in _PREFIX_TYPES:
            raise UserError(
                f"this model's {kind} adapter puts keys into the cache before the prompt, which "
                f"{unstable[0]} must be given whole; patch with a prefix-stable pattern such as "
                "sinks:4+swa:128+psa:128, which goes on over prefix and prompt"
            )
