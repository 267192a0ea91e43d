"""Assisted decoding: drafted tokens must see what they would see if they were decoded one by one.

transformers verifies the first draft together with the prompt, in one forward pass without cached
keys. To a pattern that is a longer prompt: the drafted tokens would be sparse where decoded ones
see everything, and SA would draw another permutation for the prompt. So a patched model takes
no draft in the first round, in which the prompt is read alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.patching.plan import get_plan
from sa_patch.patching.reading import Reading

# How `generate` of a model gets what drafts for it. An attribute of this name on the model itself
# comes before the method of its class, and is gone when it is taken away.
_METHOD = "_get_candidate_generator"


class DraftAfterPrompt:
    """Stands in for a model's method that makes the candidate generator of assisted decoding."""

    def __init__(self, model: PreTrainedModel, reading: Reading) -> None:
        self.model, self.reading = model, reading

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own candidate generator, whose first draft is not taken.

        Raises:
            UserError: if what a token sees depends on how many are drafted after it.
        """
        _refuse_unstable(self.model)
        generator = getattr(type(self.model), _METHOD)(self.model, *args, **kwargs)
        generator.get_candidates = _LeaveFirst(generator.get_candidates, self.reading)
        generator.update_candidate_strategy = _EndRound(
            generator.update_candidate_strategy, self.reading
        )
        return generator


class _LeaveFirst:
    def __init__(self, draft: Any, reading: Reading) -> None:
        self.draft, self.reading = draft, reading
        self.started = False

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """`input_ids [batch, n]` with a draft behind them; alone in the first round."""
        self.reading.verifies(0)
        drafted: tuple[Tensor, Any] = self.draft(input_ids, *args, **kwargs)
        if self.started:
            # The token before the draft was written in the last round, and not read yet.
            self.reading.verifies(1 + drafted[0].shape[1] - input_ids.shape[1])
            return drafted
        # The assistant has to read the prompt as well: its masks and cache begin there. To it, this
        # is a round in which nothing of its draft was right.
        self.started = True
        return input_ids, None


class _EndRound:
    def __init__(self, update: Any, reading: Reading) -> None:
        self.update, self.reading = update, reading

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The generator's own, after a draft was verified."""
        self.reading.verifies(0)
        return self.update(*args, **kwargs)


def draft_after_prompt(model: PreTrainedModel, reading: Reading | None) -> None:
    """Have assisted decoding of a model read the prompt alone, or no longer."""
    model.__dict__.pop(_METHOD, None)
    # A model that cannot generate has no such method.
    if reading is not None and hasattr(model, _METHOD):
        model.__dict__[_METHOD] = DraftAfterPrompt(model, reading)


def _refuse_unstable(model: PreTrainedModel) -> None:
    for module in model.modules():
        plan = get_plan(module)
        if plan is None or plan.pattern is None or plan.decode == "full":
            continue
        if not plan.pattern.prefix_stable:
            raise UserError(
                f"assisted decoding with decode='pattern' does not go with {plan.pattern}, under "
                "which every drafted token changes what the tokens before it see; patch with "
                "decode='full', or with a prefix-stable pattern such as swa, psa or block_topk"
            )
