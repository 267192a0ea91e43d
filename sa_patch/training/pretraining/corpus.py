"""Text as tokens on disk: made once, shared by all runs on the same text."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sa_patch.errors import UserError, one_line
from sa_patch.files.packaged import tasks_dir
from sa_patch.training.pretraining.recall import KEY_TOKENS, START_TOKEN, VALUE_TOKENS
from sa_patch.training.pretraining.settings import TextSettings

END = "<|endoftext|>"
# Documents that the tokenizer learns from, at most: it needs a sample, not terabytes.
_TOKENIZER_DOCUMENTS = 100_000
_BATCH = 256
# Tests repeat what they test, and most of the standard library's bytes are theirs.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTATION = ("*.dist-info/METADATA", "**/*.md", "**/*.rst")
# Of a dataset without a validation split, each one of so many documents is held out.
_HELD_OUT_ONE_IN = 100
# Tokens of text are uint32 on disk: any vocabulary fits.
Tokens = NDArray[np.uint32]


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and two streams of tokens in which every document ends with `END`.

    Attributes:
        fingerprint: of the tokens and the tokenizer; equal ones make equal batches.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Tokens
    validation: Tokens
    fingerprint: str


def prepare(folder: Path, settings: TextSettings) -> Corpus:
    """Open the corpus in `folder`, which is made if it is not there.

    It appears whole or not at all. Processes that start at once may each make it, all alike.

    Raises:
        UserError: if the folder holds something else or cannot be made, or the text is too short.
    """
    if not (folder / "corpus.json").is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is no corpus; name another folder for it")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"the corpus {folder} cannot be written ({error.strerror}); name another folder"
            ) from error
        try:
            _make(temporary, settings)
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _open(folder, settings)


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "corpus.json").is_file():  # else another process was first
            raise


def _open(folder: Path, settings: TextSettings) -> Corpus:
    try:
        about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        train, validation = (
            np.memmap(folder / f"{part}.bin", dtype=np.uint32, mode="r")
            for part in ("train", "validation")
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the corpus in {folder} is damaged; delete it to make it anew") from error
    if about["text"] != settings.model_dump(mode="json"):
        raise UserError(
            f"the corpus in {folder} was made with other settings of 'text'; name another folder"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Corpus(tokenizer, train, validation, about["fingerprint"])


def _make(folder: Path, settings: TextSettings) -> None:
    tokenizer = _learn_tokenizer(settings)
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    counts = {}
    for part, most in (("train", settings.max_tokens), ("validation", settings.validation_tokens)):
        count = 0
        with (folder / f"{part}.bin").open("wb") as file:
            for ids in _encoded(tokenizer, documents(settings, held_out=part == "validation")):
                if most is not None:
                    ids = ids[: most - count]
                digest.update(ids.tobytes())
                file.write(ids.tobytes())
                count += len(ids)
                if count == most:
                    break
        if not count:
            raise UserError(f"the text source {settings.source!r} has no {part} text")
        counts[part] = count
    tokenizer.save_pretrained(folder)
    about: dict[str, Any] = {"text": settings.model_dump(mode="json"), "tokens": counts}
    about["fingerprint"] = digest.hexdigest()
    (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _learn_tokenizer(settings: TextSettings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END, START_TOKEN, *KEY_TOKENS, *VALUE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = islice(documents(settings, held_out=False), _TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[Tokens]:
    iterator = iter(texts)
    end = tokenizer.convert_tokens_to_ids(END)
    while batch := list(islice(iterator, _BATCH)):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch):
            yield np.array([*encoding.ids, end], dtype=np.uint32)


def documents(settings: TextSettings, held_out: bool) -> Iterator[str]:
    """The training or the held-out documents, in an order that is always the same.

    Raises:
        UserError: if the source cannot be read.
    """
    if settings.source == "installed":
        return _installed(held_out)
    return _dataset(settings, held_out)


def _installed(held_out: bool) -> Iterator[str]:
    """Python's own sources, then the documents of installed packages.

    Held out are the modules that our lm-eval tasks read, so that these measure what was not seen.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    tasks = tasks_dir() / "stdlib_perplexity" / "stdlib_sources.py"
    tested = {stdlib / f"{name}.py" for name in runpy.run_path(str(tasks))["MODULES"]}
    chosen = [
        path
        for path in sorted(stdlib.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(stdlib).parts) and (path in tested) == held_out
    ]
    if not chosen:
        raise UserError(
            f"{stdlib} holds no sources of the standard library; use a Python that is installed "
            "with its sources, or another text source"
        )
    if not held_out:
        packages = Path(sysconfig.get_path("purelib"))
        chosen += sorted({path for kind in _DOCUMENTATION for path in packages.glob(kind)})
    for path in chosen:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield text


def _dataset(settings: TextSettings, held_out: bool) -> Iterator[str]:
    import datasets

    own_split = settings.validation_split
    split = own_split if held_out and own_split else settings.split
    files = list(settings.data_files) or None
    try:
        rows = datasets.load_dataset(
            settings.source, settings.subset, data_files=files, split=split, streaming=True
        )
    except Exception as error:  # each kind of source fails in its own ways
        raise UserError(
            f"the text source {settings.source!r} cannot be loaded: {one_line(error)}"
        ) from error
    for index, row in enumerate(rows):
        if settings.column not in row:
            raise UserError(
                f"the text source {settings.source!r} has no column {settings.column!r}; "
                f"it has {', '.join(row)}"
            )
        if own_split or (index % _HELD_OUT_ONE_IN == 0) == held_out:
            yield row[settings.column]
