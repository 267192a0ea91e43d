"""Layers that a model does not have are refused before its weights are touched."""

from pathlib import Path

import pytest
from transformers import Llama4TextConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sa_patch.errors import UserError
from sa_patch.evaluation.generation import generate_text
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.models.embedded import ModelSource
from sa_patch.models.layer_check import check_layers, check_own_windows, usual_layers
from sa_patch.patching.layers import default_layers
from sa_patch.patterns import SA
from tests.patching.families import COMMON, FAMILIES, build
from tests.small_models import tiny_config


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A folder that resolves as a model of 3 layers, and whose weights cannot be read."""
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    return tmp_path


def test_layers_beyond_the_last_are_refused_without_weights(weightless: Path) -> None:
    source = ModelSource(str(weightless), None, None, "")
    check_layers(source, None)
    check_layers(source, [0, 2])
    with pytest.raises(UserError, match=r"layers \[3, 7\] .* it has 0-2"):
        check_layers(source, [0, 3, 7])


def test_every_face_checks_before_loading(weightless: Path) -> None:
    with pytest.raises(UserError, match=r"layers \[9\]"):
        SAPatchLM(str(weightless), window=4, layers="9")
    with pytest.raises(UserError, match=r"layers \[9\]"):
        generate_text(str(weightless), "text", SA(4), layers="9")


def test_a_model_without_a_readable_configuration_is_left_to_the_loader(tmp_path: Path) -> None:
    check_layers(ModelSource(str(tmp_path), None, None, ""), [99])


def saved(folder: Path, config: PreTrainedConfig) -> ModelSource:
    config.save_pretrained(folder)
    return ModelSource(str(folder), None, None, "")


def test_a_window_of_all_layers_is_read_without_weights(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny_config("mistral", sliding_window=8))
    check_own_windows(source, [0, 1], 8)
    for layers in ([0, 1], []):
        with pytest.raises(UserError, match="layers 0-1 slide a window of 8 .* smaller --n$"):
            check_own_windows(source, layers, 9)


def test_chunks_are_read_without_weights(tmp_path: Path) -> None:
    config = Llama4TextConfig(num_hidden_layers=2, attention_chunk_size=8, no_rope_layer_interval=2)
    source = saved(tmp_path, config)
    # By default the layers without a chunk are taken.
    check_own_windows(source, [], 9)
    check_own_windows(source, [0, 1], 8)
    with pytest.raises(UserError, match="layers 0 attend within chunks of 8 .* leave them out"):
        check_own_windows(source, [0, 1], 9)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_window_that_no_mask_reads_is_none(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, tiny_config(family, sliding_window=8))
    check_own_windows(source, [0, 1], 9)


@pytest.mark.parametrize(
    ("family", "usual"),
    [("zaya", [1]), ("gemma3_text", [1]), ("qwen3_next", [1]), ("llama", [0, 1])],
)
def test_the_usual_layers_are_the_same_with_and_without_weights(
    tmp_path: Path, family: str, usual: list[int]
) -> None:
    own = FAMILIES[family]
    source = saved(tmp_path, CONFIG_MAPPING[family](**(COMMON | own)))
    assert usual_layers(source) == usual
    assert default_layers(build(family, own)) == set(usual)
