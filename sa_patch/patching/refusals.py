"""What a patched model cannot be asked for; dropping the pattern in silence would be worse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patching.layers import wrappers
from sa_patch.patterns import ByHead, Pattern

# PEFT's adapters that put keys and values into the cache.
_PREFIX_TYPES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
# What `generate_batch` and `transformers serve` begin with. An attribute of this name on the model
# itself comes before the method of its class, and is gone when it is taken away.
_BATCHING_METHOD = "init_continuous_batching"


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


def refuse_decoding(patterns: Iterable[Pattern | None]) -> None:
    """Raise `UserError` if a pattern chooses by queries that are gone when tokens are generated."""
    ahead = [p for p in patterns if p is not None and p.looks_ahead]
    if ahead:
        raise UserError(
            f"{ahead[0]} chooses keys by all queries of a prompt, and so for prompts alone: patch "
            "with decode='full', or with a pattern that does not look ahead such as block_topk"
        )


def refuse_other_heads(model: PreTrainedModel, patterns: Iterable[Pattern | None]) -> None:
    """Raise `UserError` if a pattern is for another number of KV heads than the model's."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    found = getattr(config, "num_key_value_heads", None) or heads
    for pattern in patterns:
        if isinstance(pattern, ByHead) and found not in (None, len(pattern.patterns)):
            raise UserError(
                f"{pattern} is for {len(pattern.patterns)} KV heads, and this model's layers have "
                f"{found}; give as many patterns as a layer has KV heads"
            )


def refuse_continuous_batching(model: PreTrainedModel, active: bool) -> None:
    """Have a model refuse continuous batching, or no longer."""
    model.__dict__.pop(_BATCHING_METHOD, None)
    if active and hasattr(model, _BATCHING_METHOD):
        model.__dict__[_BATCHING_METHOD] = RefuseContinuousBatching()


class RefuseContinuousBatching:
    """Stands in for the method, which may put FlashAttention in the place of a pattern."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `UserError`."""
        raise UserError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) takes "
            "transformers' own attention alone and would drop the pattern; use generate() with "
            "batches padded on the left, or unpatch_model(model) first"
        )
