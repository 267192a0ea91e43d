"""Copies of GGUF files that load in a second, kept in the user's cache.

transformers unpacks a GGUF file's vocabulary and weights anew for every process: 7 seconds of a
core for the embedded model, 24 for one of half a billion weights. A copy holds what came out of
that: the weights as safetensors in float32, and the tokenizer as JSON. It is read back and compared
when it is made; it belongs to the source's SHA-256 and to the versions that unpacked it; and its
files are checked against their checksums. It may be deleted at any time. Where none can be kept,
the source itself is loaded.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_json
from sa_patch.files.content_hash import cache_folder, file_sha256
from sa_patch.models.embedded import ModelSource
from sa_patch.models.gguf import reading_gguf_once
from sa_patch.models.quiet_output import silenced

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
# Larger files are loaded as they are: in float32 a copy may take 12 times their size.
LARGEST_FILE = 3 * 2**29
FREE_SPACE = 16
# How long one process waits for another that makes the same copy.
PATIENCE_S = 900
# What a tokenizer does beside its `tokenizers` object.
HABITS = (
    *("padding_side", "truncation_side", "model_max_length", "model_input_names"),
    *("clean_up_tokenization_spaces", "split_special_tokens", "chat_template"),
)


def find_copy(source: ModelSource) -> Path | None:
    """The folder of a source's copy, if there is one and nothing in it has changed."""
    folder = _place(source)
    return folder if folder and _files(folder) else None


def converted_copy(source: ModelSource) -> Path | None:
    """The folder of a source's copy, made now if need be; None where none can be kept.

    Only local GGUF files have copies. The folder is what ``from_pretrained`` takes for the model;
    the tokenizer is in the folder `TOKENIZER` within it.
    """
    from filelock import FileLock, Timeout

    folder = _place(source)
    if folder is None:
        return None
    try:
        if _files(folder) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock", timeout=PATIENCE_S):
                if _files(folder) is None:
                    _make(source, folder)
    except (OSError, MemoryError, NotImplementedError, Timeout):
        return None
    return folder if _files(folder) else None


def _place(source: ModelSource) -> Path | None:
    kind, _, digest = source.identity.partition(":")
    if source.gguf_file is None or kind != "sha256":
        return None
    made_by = "-".join(f"{name}-{version(name)}" for name in ("transformers", "tokenizers", "gguf"))
    place = cache_folder("models") / digest / f"{made_by}-{FORMAT}"
    return place if place.is_absolute() else None


def _files(folder: Path) -> dict[str, str] | None:
    """Checksums of a copy's files by name; empty for a source without copy, None for no manifest.

    None as well if a file is not the one that was written.
    """
    try:
        files: dict[str, str] = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        whole = all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return files if whole else None


def _make(source: ModelSource, folder: Path) -> None:
    """Put a copy at `folder`, or a manifest that lists no files if it would not be the same."""
    file = Path(source.pretrained) / str(source.gguf_file)
    size = file.stat().st_size
    if size > LARGEST_FILE or size * FREE_SPACE > shutil.disk_usage(folder.parent).free:
        return
    fresh = folder.with_name(f"{folder.name}.tmp")
    # Of a process that was killed: whoever holds the lock is alone here.
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with silenced():
            faithful = _faithfully_written(source, fresh)
        if not faithful:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
        names = sorted(path for path in fresh.rglob("*") if path.is_file())
        files = {path.relative_to(fresh).as_posix(): file_sha256(path) for path in names}
        write_json(fresh / MANIFEST, {"source": source.identity, "files": files})
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _faithfully_written(source: ModelSource, folder: Path) -> bool:
    """Unpack a source into `folder`; whether what is read back from there is the same."""
    try:
        return _write(source, folder)
    except (OSError, MemoryError):
        raise
    except Exception:
        # Why it cannot be loaded is said by who loads the source itself.
        return False


def _write(source: ModelSource, folder: Path) -> bool:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    with reading_gguf_once():
        given = {"gguf_file": source.gguf_file}
        tokenizer = AutoTokenizer.from_pretrained(source.pretrained, **given)
        model = AutoModelForCausalLM.from_pretrained(
            source.pretrained, dtype=torch.float32, **given
        )
    if getattr(model.hf_quantizer, "supported", False):
        # A newer loader: it may keep weights packed, and unpacks them in the type asked for.
        return False
    # Unpacked, the weights are nobody's but the model's.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="1TB")
    habits = {name: getattr(tokenizer, name) for name in HABITS}
    # In a folder of its own: beside a model's configuration some families (Qwen2) would add a
    # normalizer to what is read.
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **habits, **tokenizer.special_tokens_map
    ).save_pretrained(folder / TOKENIZER)
    return _same_tokenizer(
        tokenizer, AutoTokenizer.from_pretrained(folder / TOKENIZER)
    ) and _same_model(model, AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def _same_tokenizer(one: Any, other: Any) -> bool:
    said = [
        [t.backend_tokenizer.to_str(), t.special_tokens_map, *(getattr(t, name) for name in HABITS)]
        for t in (one, other)
    ]
    return said[0] == said[1]


def _same_model(one: Any, other: Any) -> bool:
    """Whether weights, buffers and settings are the same, bit by bit."""
    import torch

    settings = [m.config.to_dict() | m.generation_config.to_dict() for m in (one, other)]
    for own in settings:
        own.pop("_name_or_path", None)
    tensors = [dict(m.named_buffers()) | m.state_dict() for m in (one, other)]
    return settings[0] == settings[1] and all(
        theirs is not None and own.dtype == theirs.dtype and torch.equal(own, theirs)
        for own, theirs in ((own, tensors[1].get(name)) for name, own in tensors[0].items())
    )
