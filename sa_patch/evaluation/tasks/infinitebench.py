"""InfiniteBench: what lm-eval's files say of its data, put right.

lm-eval 0.4.13 hands the columns' types to `datasets` in a form that it does not know, and asks for
four splits by names that the hub's data do not have (its issue 3895). Without both no task loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# The task's name for a split, and the data's.
SPLITS = {
    "longbook_choice_en": "longbook_choice_eng",
    "longbook_qa_en": "longbook_qa_eng",
    "longbook_sum_en": "longbook_sum_eng",
    "longdialogue_qa_en": "longdialogue_qa_eng",
}


def is_infinitebench(config: Mapping[str, Any]) -> bool:
    """Whether a task's configuration, its functions not resolved, is one of InfiniteBench's."""
    function = str(config.get("process_results") or "")
    return f"{os.sep}tasks{os.sep}infinitebench{os.sep}" in function


def data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's configuration is changed to, so that its data can be read."""
    import datasets

    split = config["test_split"]
    given = dict(config.get("dataset_kwargs") or {})
    features = given.get("features")
    if isinstance(features, Mapping) and not isinstance(features, datasets.Features):
        given["features"] = datasets.Features(
            {name: _column(said, datasets) for name, said in features.items()}
        )
    return {"test_split": SPLITS.get(split, split), "dataset_kwargs": given}


def _column(said: Mapping[str, Any], datasets: Any) -> Any:
    value = datasets.Value(said["dtype"])
    return datasets.Sequence(value) if said.get("sequence") else value
