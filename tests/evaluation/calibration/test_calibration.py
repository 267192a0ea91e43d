"""What a layer's sparsity costs: measured right, once, and zero where it must be."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sa_patch import SA, SWA, Full, patched
from sa_patch.errors import UserError
from sa_patch.evaluation.calibration import measurement as calibrate
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.loss_store import LossStore
from sa_patch.evaluation.calibration.measurement import Calibrator, document_nll
from sa_patch.patterns import Pattern
from tests.small_models import random_tokens, tiny_model

SETTINGS = {"model": "tiny", "dtype": "float32", "backend": "auto"}
TOKENS = 48


def document(
    seed: int, kind: str = "text", counted: Sequence[int] = (1, 7, 30, 31, 47)
) -> Document:
    return Document(kind, tuple(random_tokens(1, TOKENS, seed)[0].tolist()), tuple(counted))


DOCUMENTS = [document(1), document(2, "recall", (40,)), document(3, "recall", (12, 46))]
HELD_OUT = [document(4), document(5, "recall")]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def calibrator(
    model: PreTrainedModel, path: Path, *patterns: Pattern, layers: Sequence[int] = (0, 1, 2)
) -> Calibrator:
    return Calibrator(model, patterns, layers, LossStore(path, SETTINGS))


def independent_nll(model: PreTrainedModel, text: Document) -> float:
    """From all logits, in float64, one token after the other."""
    with torch.no_grad():
        logits = model(torch.tensor([text.tokens])).logits[0].double()
    lost = [
        math.log(sum(math.exp(x) for x in logits[place - 1].tolist()))
        - logits[place - 1, text.tokens[place]].item()
        for place in text.counted
    ]
    return sum(lost) / len(lost)


@pytest.mark.parametrize("text", [*DOCUMENTS, document(6, counted=range(1, TOKENS))])
def test_a_documents_loss_is_that_of_its_counted_tokens(
    model: PreTrainedModel, text: Document
) -> None:
    assert document_nll(model, text) == pytest.approx(independent_nll(model, text), abs=1e-5)


def test_losses_are_means_over_draws_and_documents_and_kinds(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    draws = [SA(4, seed=seed) for seed in (0, 1)]
    losses = []
    for text in DOCUMENTS:
        each = []
        for pattern in draws:
            with patched(model, pattern, layers=[0, 2], backend="reference"):
                each.append(independent_nll(model, text))
        assert each[0] != pytest.approx(each[1], abs=1e-4)
        losses.append(sum(each) / 2)
    found = calibrator(model, tmp_path / "s.json", *draws).loss(DOCUMENTS, [0, 2])
    assert found.mean == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert found.by_kind == {
        "text": pytest.approx(losses[0], abs=1e-5),
        "recall": pytest.approx((losses[1] + losses[2]) / 2, abs=1e-5),
    }


def test_a_pattern_that_leaves_nothing_out_harms_no_layer(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    found = calibrator(model, tmp_path / "s.json", SWA(TOKENS)).calibrate(DOCUMENTS, [], 1)
    assert {layer: rise.mean for layer, rise in found.rises.items()} == {
        layer: pytest.approx(0, abs=1e-5) for layer in (0, 1, 2)
    }
    assert found.sparse.mean == pytest.approx(found.full.mean, abs=1e-5)
    assert found.held_out == {}


def test_only_layers_whose_attention_matters_are_harmed(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with torch.no_grad():
        # Whatever this layer attends to, nothing of it is passed on.
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = calibrator(model, tmp_path / "s.json", SWA(2)).calibrate(DOCUMENTS, [], 2)
    assert found.rises[1].mean == pytest.approx(0, abs=1e-6)
    assert all(abs(found.rises[layer].mean) > 0.01 for layer in (0, 2))
    for layer, rise in found.rises.items():
        with patched(model, SWA(2), layers=[layer], backend="reference"):
            alone = [independent_nll(model, text) for text in DOCUMENTS]
        whole = [independent_nll(model, text) for text in DOCUMENTS]
        assert rise.mean == pytest.approx((sum(alone) - sum(whole)) / 3, abs=1e-5)


def test_layers_beside_the_candidates_stay_full(model: PreTrainedModel, tmp_path: Path) -> None:
    work = calibrator(model, tmp_path / "s.json", SWA(2), layers=[0, 2])
    found = work.calibrate(DOCUMENTS, HELD_OUT, 1)
    assert set(found.rises) == {0, 2}
    assert {kept for full in found.schedules.values() for kept in full} <= {0, 2}
    with patched(model, SWA(2), layers=[0, 2]):
        both = [document_nll(model, text) for text in HELD_OUT]
    assert found.held_out["all sparse"].mean == pytest.approx(sum(both) / 2, abs=1e-6)


def test_rivals_have_as_many_full_layers_and_are_measured_on_held_out_documents(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    work = calibrator(model, tmp_path / "s.json", SWA(2))
    found = work.calibrate(DOCUMENTS, HELD_OUT, 1)
    assert {name: len(full) for name, full in found.schedules.items()} == {
        "calibrated": 1,
        "every k-th": 1,
        "first": 1,
        "last": 1,
        "first and last": 1,
    }
    harmed = max(found.rises, key=lambda layer: found.rises[layer].mean)
    assert found.schedules["calibrated"] == [harmed]
    assert set(found.held_out) == {"full", "all sparse", *found.schedules}
    for name, full in found.schedules.items():
        with patched(model, SWA(2), layers={layer: "full" for layer in full}):
            losses = [independent_nll(model, text) for text in HELD_OUT]
        assert found.held_out[name].mean == pytest.approx(sum(losses) / 2, abs=1e-5), name
    json.dumps(found.to_plain(), allow_nan=False)


def test_what_is_known_is_not_measured_again(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(model: PreTrainedModel, text: Document) -> float:
        calls.append(text)
        return document_nll(model, text)

    monkeypatch.setattr(calibrate, "document_nll", counted)
    path = tmp_path / "s.json"
    first = calibrator(model, path, SWA(2)).calibrate(DOCUMENTS, [], 1)
    # Stock, three layers alone, and all of them.
    assert len(calls) == 5 * len(DOCUMENTS)
    again = calibrator(model, path, SWA(2)).calibrate(DOCUMENTS, [], 2)
    assert len(calls) == 5 * len(DOCUMENTS)
    assert again.rises == first.rises and len(again.schedules["calibrated"]) == 2
    # A document more is all that is new, and stock attention is the same under another pattern.
    calibrator(model, path, SWA(2)).calibrate([*DOCUMENTS, HELD_OUT[0]], [], 1)
    assert calls[5 * len(DOCUMENTS) :] == 5 * [HELD_OUT[0]]
    calibrator(model, path, SWA(3)).calibrate(DOCUMENTS, [], 1)
    assert len(calls) == 5 * len(DOCUMENTS) + 5 + 4 * len(DOCUMENTS)


def test_a_loss_that_is_no_number_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is nan .* try another --dtype"):
        calibrator(model, tmp_path / "s.json", SWA(2)).calibrate(DOCUMENTS, [], 1)
    assert json.loads((tmp_path / "s.json").read_text())["nll"] == {}


def test_the_model_is_stock_again_afterwards(model: PreTrainedModel, tmp_path: Path) -> None:
    before = model(random_tokens(1, TOKENS)).logits
    calibrator(model, tmp_path / "s.json", SWA(2)).calibrate(DOCUMENTS, [], 1)
    assert torch.equal(model(random_tokens(1, TOKENS)).logits, before)


def test_full_attention_of_all_layers_is_the_stock_loss(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    work = calibrator(model, tmp_path / "s.json", Full())
    assert work.loss(DOCUMENTS, [0, 1, 2]).mean == pytest.approx(work.loss(DOCUMENTS, []).mean)


def whole_store(path: Path) -> str:
    store = LossStore(path, SETTINGS)
    store.put("full", DOCUMENTS[0], 1.5)
    return path.read_text()


def test_a_store_reads_back(tmp_path: Path) -> None:
    whole_store(tmp_path / "s.json")
    store = LossStore(tmp_path / "s.json", SETTINGS)
    assert len(store) == 1
    assert store.get("full", DOCUMENTS[0]) == 1.5
    assert store.get("full", DOCUMENTS[1]) is store.get("swa", DOCUMENTS[0]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"schema": 1', '"schema": 0'),
        lambda text: text.replace("1.5", '"x"'),
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace('"nll": {', '"nll": [], "x": {'),
        lambda text: '{"schema": 1, "settings": 3, "nll": {}}',
        lambda text: '{"schema": 1, "settings": {}, "nll": {"full": 3}}',
    ],
)
def test_a_torn_or_foreign_store_is_refused_and_left_alone(
    damage: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / "s.json"
    path.write_text(damage(whole_store(path)))
    found = path.read_text()
    with pytest.raises(UserError, match="s.json is torn, or no file of sa-patch calibrate"):
        LossStore(path, SETTINGS)
    assert path.read_text() == found


@pytest.mark.parametrize("name", ["model", "dtype", "backend"])
def test_a_store_of_other_settings_is_refused(name: str, tmp_path: Path) -> None:
    whole_store(tmp_path / "s.json")
    with pytest.raises(UserError, match=f"measured with another {name}; give another --out"):
        LossStore(tmp_path / "s.json", {**SETTINGS, name: "other"})
