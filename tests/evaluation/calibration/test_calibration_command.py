"""``sa-patch calibrate``: from a model to a schedule that every face of the program takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from sa_patch.cli.command import main
from sa_patch.evaluation.calibration import measurement as calibrate
from sa_patch.evaluation.calibration import run as calibrate_run
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.patching import Schedule
from sa_patch.patterns import Full, parse_pattern
from sa_patch.sweep.config import parse_config
from tests.tiny_checkpoint import tiny_tokenizer

SPARSE = ["--method", "sinks:2+swa:20", "--n", "300", "--documents", "1"]
# Documents of two kinds, each under full attention, three layers alone, and all of them sparse.
MEASURED = 2 * 5


def calls_of(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Any]:
    """The documents that are measured from here on; before one more than `stop_at`, Ctrl-C."""
    measured: list[Any] = []
    measure: Callable[..., float] = calibrate.document_nll

    def counted(model: Any, document: Any) -> float:
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(document)
        return measure(model, document)

    monkeypatch.setattr(calibrate, "document_nll", counted)
    return measured


def test_a_model_becomes_a_schedule(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "schedule.yaml"
    options = ["--full-layers", "1", "--compare", "--out", str(out)]
    assert main(["calibrate", str(checkpoint), *SPARSE, *options]) == 0
    shown = capfd.readouterr()
    assert str(out) in shown.out and str(out.with_suffix(".json")) in shown.out
    assert "layer 2 alone sparse" in shown.err and "Traceback" not in shown.err
    for name in ("calibrated", "every k-th", "first and last", "all sparse"):
        assert name in shown.out
    written = yaml.safe_load(out.read_text())
    found = json.loads(out.with_suffix(".json").read_text())["result"]
    rises = {layer: rise["mean"] for layer, rise in found["rises"].items()}
    harmed = int(max(rises, key=lambda layer: rises[layer]))
    sparse = tuple(layer for layer in range(3) if layer != harmed)
    assert written["full_layers"] == [harmed] == found["schedules"]["calibrated"]
    assert written["rises"] == {int(k): pytest.approx(v, abs=1e-5) for k, v in rises.items()}
    assert written["pattern"] == "sinks:size=2+swa:window=20" and written["seeds"] == []
    assert found["provenance"]["command"][:2] == ["sa-patch", "calibrate"]
    # It reads back wherever layers are named.
    assert read_layers(str(out)) == Schedule(listed=sparse)
    sweep = {"methods": [{"method": "swa:4", "layers": str(out)}], "tasks": ["needle_128"]}
    assert parse_config(sweep).methods[0].layers == Schedule(listed=sparse)
    assert parse_config({**sweep, "layers": str(out)}).layers == Schedule(listed=sparse)
    generate = ["generate", str(checkpoint), "The old man", "--method", "swa:4"]
    assert main([*generate, "--layers", str(out), "--max-new-tokens", "4"]) == 0


def test_a_run_that_was_interrupted_goes_on(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["calibrate", str(checkpoint), *SPARSE, "--out", str(tmp_path / "s.yaml")]
    with monkeypatch.context() as patch:
        assert len(calls_of(patch, stop_at=5)) == 0
        assert main(command) == 130
    assert capfd.readouterr().err.endswith("sa-patch: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
    with monkeypatch.context() as patch:
        measured = calls_of(patch)
        assert main(command) == 0
    assert len(measured) == MEASURED - 5
    assert f"5 losses are known from {tmp_path / 's.json'}" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        measured = calls_of(patch)
        assert main([*command, "--full-layers", "2"]) == 0
    assert measured == []
    assert len(yaml.safe_load((tmp_path / "s.yaml").read_text())["full_layers"]) == 2


def test_seeds_are_the_methods_own_unless_given(checkpoint: Path, tmp_path: Path) -> None:
    def losses(*options: str) -> dict[str, Any]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        command = ["calibrate", str(checkpoint), "--n", "300", "--documents", "1", "--layers", "1"]
        assert main([*command, *options, "--out", str(out)]) == 0
        known = json.loads(out.with_suffix(".json").read_text())
        assert yaml.safe_load(out.read_text())["seeds"] == known["result"]["seeds"]
        return dict(known["nll"]) | {"seeds": known["result"]["seeds"]}

    own = losses("--method", "sa:8,seed=3")
    assert set(own) == {"full", "sa:window=8,seed=3 layers 1", "seeds"} and own["seeds"] == [3]
    given = losses("--method", "sa:8", "--seeds", "3,4,3")
    assert given["seeds"] == [3, 4]
    assert given["sa:window=8,seed=3 layers 1"] == own["sa:window=8,seed=3 layers 1"]
    assert given["sa:window=8,seed=4 layers 1"] != own["sa:window=8,seed=3 layers 1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention in layers 1 and 2 only, and a window in the others."""
    folder, tokenizer = tmp_path_factory.mktemp("mixed"), tiny_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_layers_with_a_window_of_their_own_are_no_candidates(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.yaml"
    options = ["--full-layers", "1", "--dtype", "bfloat16", "--out", str(out)]
    assert main(["calibrate", str(mixed), *SPARSE, *options]) == 0
    written = yaml.safe_load(out.read_text())
    assert written["dtype"] == "bfloat16"
    assert written["candidates"] == "1-2" and set(written["rises"]) == {1, 2}
    assert {written["layers"], *map(str, written["full_layers"])} == {"1", "2"}


def test_a_text_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "mine.txt", tmp_path / "s.yaml"
    text.write_text(" ".join(str(number) for number in range(300)))
    options = ["--text", str(text), "--compare", "--out", str(out)]
    assert main(["calibrate", str(checkpoint), *SPARSE, *options]) == 0
    found = json.loads(out.with_suffix(".json").read_text())["result"]
    assert list(found["loss_full"]["by_kind"]) == ["text"] and found["text"] == str(text)
    assert found["held_out"]["full"] != found["loss_full"]


def test_a_threshold_is_fitted_to_a_share(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "mine.txt", tmp_path / "p.yaml"
    text.write_text(" ".join(map(str, range(99))))
    options = ["--n", "96", "--documents", "1", "--text", str(text), "--out", str(out)]
    command = ["calibrate", str(checkpoint), "--pattern", "prism:{},4", *options]
    assert main([*command, "--share", "3/5"]) == 0
    shown, progress = capfd.readouterr()
    assert "of full attention's FLOPs\n" in progress  # a line for each try
    written = yaml.safe_load(out.read_text())
    assert 0.5 < written["flops"] <= 0.6
    assert f"{written['flops']:.4f} of full attention's; keys" in shown
    # A tile of so short a text reads nearly everything.
    assert main([*command, "--share", "3/5", "--cost", "visited"]) == 2
    assert "of full attention's visited keys on these texts" in capfd.readouterr().err
    # It goes wherever a pattern goes.
    assert str(parse_pattern(str(out))) == written["pattern"]


def test_heads_that_retrieve_stay_full(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.yaml"
    options = ["--full-heads", "2", "--method", "sinks:2+swa:8", "--n", "300", "--documents", "1"]
    assert main(["calibrate", str(checkpoint), *options, "--out", str(out)]) == 0
    scores = yaml.safe_load(out.read_text())["scores"]
    best = sorted((-x, layer, head) for layer, own in scores.items() for head, x in enumerate(own))
    full = {(layer, head) for _, layer, head in best[:2]}
    own = dict(read_layers(str(out)).own or ())
    for layer, pattern in own.items():
        each = getattr(pattern, "patterns", (pattern,) * len(scores[layer]))
        # None is stock attention.
        kept = {(layer, head) for head, one in enumerate(each) if one is None or one == Full()}
        assert kept == {place for place in full if place[0] == layer}
    generate = ["generate", str(checkpoint), "The old man", "--layers", str(out)]
    assert main([*generate, "--method", "full", "--max-new-tokens", "2"]) == 0


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded in here."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(calibrate_run, "load_causal_lm", load)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr of a command that is refused with status 2."""
    assert main(["calibrate", *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sa-patch: error: "), lines
    return lines[0]


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "saa:4"], "unknown method 'saa'; did you mean 'sa'?"),
        (["--method", "swa"], "method 'swa' needs 'window'"),
        (["--method", "full"], "--method full leaves nothing to calibrate"),
        (["--method", "swa:300"], "leaves nothing out of 300 tokens"),
        (["--n", "15"], "--n must be a whole number of at least 16, got 15"),
        (["--n", "80"], "--n 80 has no room for the pass words and their questions"),
        (["--n", "4096"], "--n 4096 is more than the model's context of 2048 tokens"),
        (["--documents", "0"], "--documents must be a whole number of at least 1, got 0"),
        (["--full-layers", "3"], "must leave at least one of 3 layers sparse"),
        (["--full-layers", "-1"], "from 0 to 2; got -1"),
        (["--layers", "1", "--full-layers", "1"], "must leave at least one of 1 layers sparse"),
        (["--layers", "9"], "layers [9] are not attention layers of this model; it has 0-2"),
        (["--layers", "x"], "numbers and ranges"),
        (["--layers", ""], "layers is empty"),
        (["--seeds", "1"], "draws nothing at random, so leave --seeds out"),
        (["--method", "sa:4", "--seeds", "1,x"], "--seeds are whole numbers such as 0,1,2"),
        (["--method", "sa:4", "--seeds", "²"], "--seeds are whole numbers such as 0,1,2"),
        (["--method", "sa:4", "--seeds", ","], "--seeds are whole numbers such as 0,1,2"),
        (["--backend", "bandit"], "did you mean 'banded'"),
        (["--dtype", "float7"], "unknown dtype 'float7'"),
        (["--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["--text", "."], "no text file ."),
        (["--text", __file__, "--documents", "999"], "windows of 300 tokens, and 999 are needed"),
        (["--out", "s.json"], "--out s.json must end in .yaml"),
        (["--gguf-file", "none.gguf"], "no file none.gguf"),
        (["--revision", "old"], "means something for hub ids only"),
        (["--full-heads", "0"], "--full-heads must be a whole number of at least 1, got 0"),
        (["--full-heads", "1", "--share", "1/8"], "--full-heads and --share do not go together"),
        (["--full-heads", "1", "--compare"], "--compare is for the calibration of layers"),
        (["--full-heads", "1", "--method", "sa:8,per_head=true"], "must be the same for all heads"),
        (["--full-heads", "1", "--text", __file__], "needs texts that hide what they ask for"),
        (["--share", "2"], "above 0 and below 1, such as 1/8 or 0.125; got '2'"),
        (["--share", "1/8", "--method", "prism:0.5"], "a family has {} for the number"),
        (["--share", "1/8", "--method", "prism:{},0"], "block_size must be a whole number"),
        (["--share", "1/8", "--method", "prism:{}", "--cost", "time"], "unknown cost 'time'"),
    ],
)
def test_mistakes_are_one_sentence_before_the_model_is_loaded(
    options: list[str],
    sentence: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capfd, str(checkpoint), *SPARSE, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("weightless")
def test_a_model_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"no model at {nowhere}" in refused(capfd, str(nowhere), *SPARSE)


@pytest.mark.usefixtures("weightless")
def test_layers_with_a_window_of_their_own_are_refused_where_it_is_too_short(
    mixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--layers", "0-1,3", "--full-layers", "1", "--out", str(tmp_path / "s.yaml")]
    said = refused(capfd, str(mixed), *SPARSE, *options)
    assert "layers 0,3 slide a window of 8 tokens" in said


@pytest.mark.usefixtures("weightless")
def test_the_budget_of_a_mixed_model_counts_its_full_layers(
    mixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--full-layers", "2", "--out", str(tmp_path / "s.yaml")]
    assert "at least one of 2 layers sparse" in refused(capfd, str(mixed), *SPARSE, *options)


@pytest.mark.usefixtures("weightless")
def test_files_of_others_are_left_alone(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content, sentence in (
        ("sweep.yaml", "methods: [swa]\n", "sweep.yaml was not written by sa-patch calibrate"),
        ("table.json", '{"rows": []}', "table.json is torn, or no file of sa-patch calibrate"),
    ):
        path = tmp_path / name
        path.write_text(content)
        out = str(path.with_suffix(".yaml"))
        assert sentence in refused(capfd, str(checkpoint), *SPARSE, "--out", out)
        assert path.read_text() == content
    (tmp_path / "folder.yaml").mkdir()
    said = refused(capfd, str(checkpoint), *SPARSE, "--out", str(tmp_path / "folder.yaml"))
    assert "was not written by sa-patch calibrate" in said
    said = refused(capfd, str(checkpoint), *SPARSE, "--out", str(path / "s.yaml"))
    assert "cannot be written" in said and "--out" in said
