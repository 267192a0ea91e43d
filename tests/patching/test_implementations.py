"""Patterns under names of their own: wherever transformers takes a string."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

import sa_patch
from sa_patch import SA, SWA, Sinks, patch_model, patched, register_implementation, unpatch_model
from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.patching.implementations import VARIABLE, register_from_environment
from tests import processes
from tests.small_models import PAD, random_tokens, tiny_model
from tests.thorough import THOROUGH
from tests.tiny_checkpoint import save_tiny_checkpoint

TOKENS = random_tokens(2, 20)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_implementation("sa-3", SA(window=3))
    register_implementation("w-3", "swa:3", layers=[0, 1], decode="pattern", backend="banded")
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_a_loaded_model_is_patched_in_its_first_pass(checkpoint: Path) -> None:
    stock = load(checkpoint)
    before = logits(stock)
    expected = logits(patch_model(load(checkpoint), SA(3)))
    assert not torch.allclose(before, expected, atol=1e-2)
    named = load(checkpoint, attn_implementation="sa-3")
    assert torch.equal(logits(named), expected)
    assert torch.equal(logits(named), expected)
    assert set(layer_patterns(named).values()) == {SA(3)}
    assert torch.equal(logits(stock), before), "other models are left alone"
    assert torch.equal(logits(unpatch_model(named)), before)
    assert named.config._attn_implementation == "sdpa"
    named.set_attn_implementation("w-3")
    assert torch.equal(
        logits(named), logits(patch_model(stock, SWA(3), layers=[0, 1], backend="banded"))
    )
    assert layer_patterns(named) == {0: SWA(3), 1: SWA(3), 2: None}


def test_generation_is_that_of_a_patched_model(checkpoint: Path) -> None:
    expected = patch_model(load(checkpoint), SA(3)).generate(TOKENS, **GREEDY)
    assert torch.equal(
        load(checkpoint, attn_implementation="sa-3").generate(TOKENS, **GREEDY), expected
    )
    writer = pipeline(
        "text-generation",
        model=str(checkpoint),
        model_kwargs={"attn_implementation": "sa-3"},
    )
    assert set(layer_patterns(writer.model).values()) == {None}
    writer("the sea is", max_new_tokens=3)
    assert set(layer_patterns(writer.model).values()) == {SA(3)}


def test_models_of_one_configuration_part(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint, attn_implementation="sa-3")
    one, two = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    inner = one.model
    inner(TOKENS)
    assert set(layer_patterns(one).values()) == {SA(3)}, "the whole model, run from inside"
    unpatch_model(one)
    two(TOKENS)
    assert set(layer_patterns(two).values()) == {SA(3)}
    assert one.config._attn_implementation == "sdpa"


def test_patching_and_saving_before_the_first_pass(checkpoint: Path, tmp_path: Path) -> None:
    stock = logits(load(checkpoint))
    named = load(checkpoint, attn_implementation="sa-3")
    with patched(named, SWA(3)):
        assert not torch.allclose(logits(named), stock, atol=1e-2)
    assert named.config._attn_implementation == "sa-3"
    named.save_pretrained(tmp_path)
    assert "sa-3" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert torch.equal(logits(unpatch_model(copy.deepcopy(named))), stock)
    assert torch.equal(logits(named), logits(patch_model(load(checkpoint), SA(3))))


def test_what_a_first_pass_cannot_be(checkpoint: Path) -> None:
    tokens = random_tokens(1, 9).repeat(1, 2)[:, :17]
    for name, pattern, options in (
        ("sa-3", SA(3), {"prompt_lookup_num_tokens": 4}),
        ("swa-5", SWA(5), {"prefill_chunk_size": 8}),
    ):
        register_implementation(name, pattern)
        named = load(checkpoint, attn_implementation=name)
        with pytest.raises(UserError, match=f"first use of a model under .*{name}.* call it again"):
            named.generate(tokens, **GREEDY, **options)
        again = named.generate(tokens, **GREEDY, **options)
        expected = patch_model(load(checkpoint), pattern).generate(tokens, **GREEDY)
        assert torch.equal(again, expected)


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "name": (("a/b", SA(3)), {}, "letters, digits"),
    "no name": ((3, SA(3)), {}, "letters, digits"),
    "transformers' own": (("my-sdpa", SA(3)), {}, "without the names of transformers' own"),
    "taken": (("sa_patch", SA(3)), {}, "an attention implementation already"),
    "pattern": (("x", 12), {}, "pattern must be"),
    "text": (("x", "swb:3"), {}, "did you mean"),
    "decode": (("x", SA(3)), {"decode": "none"}, "decode must be"),
    "backend": (("x", SA(3)), {"backend": "bandid"}, "unknown backend"),
    "layers": (("x", SA(3)), {"layers": "1-x"}, "numbers and ranges"),
    "other": (("sa-3", SA(4)), {}, "registered already, for sa:window=3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_register_nothing(checkpoint: Path, case: str) -> None:
    arguments, options, says = BAD[case]
    with pytest.raises(UserError, match=says):
        register_implementation(*arguments, **options)
    register_implementation("sa-3", "sa:3")  # the same again does nothing
    with pytest.raises(ValueError, match="not supported"):
        load(checkpoint, attn_implementation="x")


def test_a_ready_mask_is_refused_in_the_first_pass(checkpoint: Path) -> None:
    named = load(checkpoint, attn_implementation="sa-3")
    mask = torch.ones(1, 1, 20, 20).tril().bool()
    with pytest.raises(
        UserError, match="attn_implementation='sa-3' makes its own mask: a ready 4D"
    ):
        named(TOKENS, attention_mask=mask)


def test_layers_that_a_model_lacks_are_refused_in_its_first_pass(checkpoint: Path) -> None:
    register_implementation("deep", SWA(3), layers=[7])
    named = load(checkpoint, attn_implementation="deep")
    with pytest.raises(UserError, match=r"layers \[7\] are not attention layers of this model"):
        logits(named)


def test_an_entry_of_the_environment_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, says in (
        ("sa-9", f"{VARIABLE} holds names and patterns such as"),
        ("a=swa:3;b=", "got 'b='"),
        ("c=sb:9", f"{VARIABLE}, 'c=sb:9': unknown"),
    ):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(UserError, match=says):
            register_from_environment()


def test_importing_the_package_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sa-9=sa:window=9; s.w_4 = sinks:2+swa:4;")
    monkeypatch.setattr(sys, "argv", ["program"])
    importlib.reload(sa_patch)
    for name, pattern in (("sa-9", SA(9)), ("s.w_4", Sinks(2) | SWA(4))):
        model = tiny_model("llama")
        model.set_attn_implementation(name)
        assert torch.equal(logits(model), logits(patch_model(tiny_model("llama"), pattern)))
    monkeypatch.setenv(VARIABLE, "sa-9:sa")
    with pytest.raises(UserError, match="got 'sa-9:sa'"):
        importlib.reload(sa_patch)


def test_the_command_reports_a_bad_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "sa-9:sa")
    for argv in (["/usr/bin/sa-patch", "methods"], ["-m", "methods"]):
        monkeypatch.setattr(sys, "argv", argv)
        importlib.reload(sa_patch)
        assert main() == 2
        assert capsys.readouterr().err.startswith(f"sa-patch: error: {VARIABLE} holds names")


@pytest.mark.skipif(not THOROUGH, reason="two processes load transformers: thorough only")
def test_the_environment_names_implementations_for_a_process(checkpoint: Path) -> None:
    program = (
        "import sys, torch, sa_patch; from transformers import AutoModelForCausalLM as Auto;"
        "from sa_patch.patching import layer_patterns;"
        "m = Auto.from_pretrained(sys.argv[1], attn_implementation='sa-9');"
        "m(torch.arange(20)[None]); print(layer_patterns(m)[0])"
    )
    found = run(["-c", program, str(checkpoint)], "sa-9=sa:window=9; other=swa:4")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("sa:window=9")
    wrong = run(["-m", "sa_patch", "methods"], "sa-9:sa")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"sa-patch: error: {VARIABLE} holds names")
    assert "Traceback" not in wrong.stderr


def run(arguments: list[str], value: str) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments, environment={VARIABLE: value})
