"""What the tests leave out of Triton's interpreter is seen nowhere but in the time it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from sa_patch.patterns import PSA, SWA, BlockTopK, MoBA, Sinks
from tests.kernels.triton.test_unions import run, small_case


@pytest.fixture
def replacements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a name for everything that is replaced in the language."""
    names: list[str] = []
    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def counted(self: Any, obj: object, name: str, value: object) -> None:
        names.append(name)
        set_attr(self, obj, name, value)

    monkeypatch.setattr(scope, "set_attr", counted)
    return names


def language() -> dict[tuple[str, str], object]:
    tl = interpreter.tl
    owners = {"tl": tl, "tensor": tl.tensor, "math": tl.math, "dtype": tl.dtype}
    return {(at, name): value for at, it in owners.items() for name, value in vars(it).items()}


def test_bits_and_the_language_left_behind_are_those_of_the_whole_interpreter(
    monkeypatch: pytest.MonkeyPatch, replacements: list[str]
) -> None:
    """In calls that go through every kernel."""
    patterns = [SWA(9) | BlockTopK(3, 2), Sinks(2) | PSA(6) | MoBA(5, 2)]
    case = small_case(seq_len=40)
    run(case, SWA(9))  # the first launch of all leaves inherited attributes as own ones
    replacements.clear()
    before = language()
    ours = [run(case, pattern) for pattern in patterns]
    assert language() == before
    few = len(replacements)
    for owner, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_patch_attr"),
        (interpreter, "_get_np_dtype"),
        (interpreter.GridExecutor, "__call__"),
        (interpreter.tl.core.tensor, "__init__"),
        (interpreter.tl.core.block_type, "__init__"),
        (type(interpreter.interpreter_semantic), "broadcast_impl_value"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", options)
    before = language()
    whole = [run(case, pattern) for pattern in patterns]
    assert language() == before
    assert len(replacements) - few > 5 * few > 0, "there was nothing left out"
    for (out, lse), (right, right_lse) in zip(ours, whole, strict=True):
        assert torch.equal(out, right) and torch.equal(lse, right_lse)
