"""Text as tokens on disk: made once, shared by all runs on the same text."""

from __future__ import annotations

import hashlib
import json
import shutil
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

from sa_patch.errors import UserError
from sa_patch.training.pretraining.documents import documents
from sa_patch.training.pretraining.recall import KEY_TOKENS, START_TOKEN, VALUE_TOKENS
from sa_patch.training.pretraining.settings import TextSettings

END = "<|endoftext|>"
# Documents that the tokenizer learns from, at most: it needs a sample, not terabytes.
_TOKENIZER_DOCUMENTS = 100_000
_BATCH = 256
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
        UserError: if the folder holds a corpus of other settings, or the text is too short.
    """
    if not (folder / "corpus.json").is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is no corpus; name another folder for it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
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
        train, validation = (_tokens(folder / f"{part}.bin") for part in ("train", "validation"))
    except (OSError, ValueError) as error:
        raise UserError(f"the corpus in {folder} is damaged; delete it to make it anew") from error
    if about["text"] != _plain(settings):
        raise UserError(
            f"the corpus in {folder} was made with other settings of 'text'; name another folder"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Corpus(tokenizer, train, validation, about["fingerprint"])


def _tokens(path: Path) -> Tokens:
    return np.memmap(path, dtype=np.uint32, mode="r")


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
    about = {"text": _plain(settings), "tokens": counts, "fingerprint": digest.hexdigest()}
    (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _plain(settings: TextSettings) -> Any:
    return settings.model_dump(mode="json")


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
