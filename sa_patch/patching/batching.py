"""Continuous batching, which transformers computes by its own attention alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sa_patch.errors import UserError

# What `generate_batch` and `transformers serve` begin with. An attribute of this name on the model
# itself comes before the method of its class, and is gone when it is taken away.
_METHOD = "init_continuous_batching"


class RefuseContinuousBatching:
    """Stands in for the method, which may put FlashAttention in the place of a pattern."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `UserError`."""
        raise UserError(
            "continuous batching (generate_batch, transformers serve --continuous-batching) takes "
            "transformers' own attention alone and would drop the pattern; use generate() with "
            "batches padded on the left, serve without it, or unpatch_model(model) first"
        )


def refuse_continuous_batching(model: PreTrainedModel, active: bool) -> None:
    """Have a model refuse continuous batching, or no longer."""
    model.__dict__.pop(_METHOD, None)
    if active and hasattr(model, _METHOD):
        model.__dict__[_METHOD] = RefuseContinuousBatching()
