"""What a trained model is measured by, on any share of the rows and in parts of any size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.training.gated.models import gate_layers
from sa_patch.training.pretraining.evaluate import gate_statistics, recall_hits, validation_loss
from sa_patch.training.pretraining.methods import Method, build_model
from sa_patch.training.pretraining.settings import PretrainingSettings, load_settings
from tests.training.tiny_run import write_config

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> PretrainingSettings:
    return load_settings(write_config(tmp_path))


def test_a_process_without_a_share_of_the_rows_adds_nothing(settings: PretrainingSettings) -> None:
    model = build_model(Method.read("full", 8), settings, 600, seed=0)
    none = torch.empty(0, 64, dtype=torch.int64)
    assert validation_loss(model, none, 2, CPU).tolist() == [0, 0]
    assert recall_hits(model, none, none, 8, 2, CPU).tolist() == [[0, 0]] * 4


def test_gates_are_told_apart_by_branch_head_and_layer(settings: PretrainingSettings) -> None:
    model: Any = build_model(Method.read("gated", 8), settings, 600, seed=0)
    # SA's head 0 and 1, then SWA's: constant over tokens.
    opened = torch.tensor([0.1, 0.2, 0.7, 0.9])
    for index, layer in enumerate(gate_layers(model)):
        torch.nn.init.zeros_(layer.gate_proj.weight)
        layer.gate_proj.bias.data = torch.logit(opened / (index + 1))
    rows = torch.randint(600, (3, 64))
    found = gate_statistics(model, rows, 2, CPU)
    for index, row in enumerate(found):
        for branch, heads in (("sa", [0.1, 0.2]), ("swa", [0.7, 0.9])):
            expected = [head / (index + 1) for head in heads]
            assert row[branch]["heads"] == pytest.approx(expected)
            assert row[branch]["mean"] == pytest.approx(sum(expected) / 2)
            assert row[branch]["deviation_over_tokens"] == pytest.approx(0, abs=1e-6)
    swa = build_model(Method.read("swa", 8), settings, 600, 0)
    assert gate_statistics(swa, rows, 2, CPU) == []


def test_gates_are_those_of_all_rows_read_a_few_at_a_time(settings: PretrainingSettings) -> None:
    model: Any = build_model(Method.read("gated", 8), settings, 600, seed=0)
    rows, sizes = torch.randint(600, (5, 64)), []
    whole = gate_statistics(model, rows, 5, CPU)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    parts = gate_statistics(model, rows, 2, CPU)
    assert sizes == [2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        for branch in ("sa", "swa"):
            assert one[branch]["deviation_over_tokens"] > 1e-3
            for key, value in one[branch].items():
                assert other[branch][key] == pytest.approx(value, rel=1e-5), key
