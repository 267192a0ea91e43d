"""lm-eval's request cache, which is keyed by the request alone: whose answers it may hold."""

from __future__ import annotations

import hashlib

from lm_eval.api.model import CacheHook
from transformers import PreTrainedModel

from sa_patch.errors import UserError

_OWNER = "sa_patch:owner"


def claim(cache_hook: CacheHook, owner: str) -> None:
    """Write the owner into a new cache.

    Args:
        owner: all that an answer depends on beside the request.

    Raises:
        UserError: if the cache holds answers of another.
    """
    answers = cache_hook.dbdict
    if answers is None:
        return
    known = answers.get(_OWNER, None if len(answers) else owner)
    if known != owner:
        raise UserError(
            f"the request cache was filled by {known or 'another model'!r}, not by {owner!r}; "
            "give each pattern a --use_cache of its own"
        )
    answers[_OWNER] = owner


def fingerprint(model: PreTrainedModel) -> str:
    """What tells a model's weights from those of others: its settings, a few numbers of each."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in model.named_parameters():
        found.update(name.encode())
        if not weight.is_meta:
            found.update(weight.detach().flatten()[:16].double().cpu().numpy().tobytes())
    return f"{type(model).__name__} {found.hexdigest()[:16]}"
