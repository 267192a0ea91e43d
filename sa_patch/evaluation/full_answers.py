"""Answers of full attention, kept for the prompts of which a pattern hides nothing.

A pattern that is saturated in every layer is full attention (law 2), so that its answer to the same
tokens is the same. In a sweep most short prompts are so under most windows: each is computed once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_patch.files.atomic_write import write_whole

Answer = Any
"""What JSON can hold: ``[log-likelihood, is greedy]``, log-likelihoods, or generated tokens."""


class FullAnswers:
    """What full attention answered, by what it was asked; in memory, and in files if there are.

    Each cell that computes something new leaves one file, whole or not at all, so that several
    processes can share a folder without waiting for each other.

    Args:
        identity: all that determines an answer beside the question (model, dtype, device, ...), as
            JSON. Answers under another identity are never found.
        folder: an existing folder for the files; None to keep answers in memory alone.
    """

    def __init__(self, identity: Mapping[str, Any], folder: Path | None = None) -> None:
        self._identity = json.loads(json.dumps(dict(identity)))
        self._folder = folder if folder is not None and folder.is_dir() else None
        self._known: dict[str, Answer] = {}
        self._new: dict[str, Answer] = {}
        self._read: set[str] = set()

    def refresh(self) -> None:
        """Read the files that other processes have written meanwhile; torn or foreign ones not."""
        if self._folder is None:
            return
        for file in sorted(self._folder.glob(f"{self._prefix}*.json")):
            if file.name in self._read:
                continue
            self._read.add(file.name)
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                if content["identity"] == self._identity:
                    self._known.update(content["answers"])
            except (OSError, ValueError, KeyError, TypeError):
                logging.getLogger(__name__).warning("%s is torn or foreign: ignored", file)

    def find(self, *question: Any) -> Answer | None:
        """The answer to a question of JSON values, or None."""
        return self._known.get(_key(question))

    def add(self, answer: Answer, *question: Any) -> None:
        key = _key(question)
        if key not in self._known:
            self._known[key] = self._new[key] = answer

    def save(self, name: str) -> None:
        """Write what is new since the last time, under the name of the cell that found it."""
        new, self._new = self._new, {}
        if self._folder is None or not new:
            return
        file = self._folder / f"{self._prefix}{name}.json"
        self._read.add(file.name)
        text = json.dumps({"identity": self._identity, "answers": new}, allow_nan=False)
        write_whole(file, text.encode("utf-8"))

    @property
    def _prefix(self) -> str:
        return f"{_key([self._identity])[:12]}-"


def _key(question: Any) -> str:
    text = json.dumps(question, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
