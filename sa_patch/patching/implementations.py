"""Patterns under names of their own, for programs that can be given nothing but a string.

`from_pretrained(..., attn_implementation="sa-128")` is such a place, and so are the command lines
of lm-eval and of trainers. A model under a registered name becomes a patched one in its first
forward pass: only then is there something that knows both the name and the model.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

from torch.compiler import disable
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from sa_patch.errors import UserError
from sa_patch.kernels import check_backend
from sa_patch.patching.attention import OWN_NAMES
from sa_patch.patching.graphs import attention_function
from sa_patch.patching.mask import SparseMask, sparse_mask
from sa_patch.patching.patch import check_decode, patch_model
from sa_patch.patching.schedule import Layers, Schedule
from sa_patch.patterns import Pattern, parse_pattern

VARIABLE = "SA_PATCH_IMPLEMENTATIONS"
"""The environment variable that names implementations: ``"sa-128=sa:window=128; w=swa:64"``."""

# Names that transformers would take for a kernel of its hub, or for one of its own.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = re.compile(r"eager|sdpa|flash|flex|paged")


@dataclass(frozen=True)
class Implementation:
    """The arguments of `patch_model` behind a name."""

    pattern: Pattern
    schedule: Schedule
    decode: str
    backend: str


_REGISTERED: dict[str, Implementation] = {}
# Configurations whose models have been patched, and have one of their own since.
_LEFT: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register_implementation(
    name: str,
    pattern: Pattern | str,
    *,
    layers: Layers = None,
    decode: str = "full",
    backend: str = "auto",
) -> None:
    """Give a pattern a name that transformers takes as ``attn_implementation``, in this process.

    In its first forward pass a model under that name is patched, as by `patch_model` with these
    arguments; from then on it is an ordinary patched model, and `unpatch_model` gives it the
    attention it would have had without a name. Registering the same again does nothing.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``, such as ``"sa-128"``.
        pattern: which keys a query sees, or its text form (``"sa:window=128"``).
        layers, decode, backend: as for `patch_model`; layers that a model does not have are refused
            in its first forward pass.

    Raises:
        UserError: for a bad argument, or a name that stands for something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.search(name):
        raise UserError(
            f"the name of an implementation must be of letters, digits, '.', '_' and '-', without "
            f"the names of transformers' own (eager, sdpa, flash, flex, paged), got {name!r}; "
            "write for example 'sa-128'"
        )
    if isinstance(pattern, str):
        pattern = parse_pattern(pattern)
    if not isinstance(pattern, Pattern):
        raise UserError(f"pattern must be a pattern such as SA(window=128), got {pattern!r}")
    new = Implementation(
        pattern, Schedule.read(layers), check_decode(decode), check_backend(backend)
    )
    known = _REGISTERED.get(name)
    if known is None and name in AttentionInterface().valid_keys():
        raise UserError(f"{name!r} is an attention implementation already; take another name")
    if known not in (None, new):
        raise UserError(
            f"the implementation {name!r} is registered already, for {known.pattern} with other "
            "arguments; take another name"
        )
    if known is None:
        _REGISTERED[name] = new
        OWN_NAMES.add(name)
        reason = "sa_patch patches the model here"
        AttentionInterface.register(name, attention_function)
        mask = functools.partial(_patch_first, name)
        AttentionMaskInterface.register(name, disable(mask, reason=reason))


def register_from_environment() -> None:
    """Register what `VARIABLE` names.

    Raises:
        UserError: for an entry that is not ``name=pattern``.
    """
    for entry in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(";"))):
        name, equals, text = entry.partition("=")
        if not equals or not text.strip():
            raise UserError(
                f"{VARIABLE} holds names and patterns such as 'sa-128=sa:window=128', several "
                f"separated by ';', got {entry!r}"
            )
        try:
            register_implementation(name.strip(), text.strip())
        except UserError as error:
            raise UserError(f"{VARIABLE}, {entry!r}: {error}") from error


def _patch_first(name: str, **arguments: Any) -> SparseMask:
    """The mask function of a name: patches the models that are about to be run under it."""
    chosen, config = _REGISTERED[name], arguments["config"]
    models = _models_of(config)
    if not models and _LEFT.get(id(config)) is not config:
        raise UserError(
            f"the model that runs under attn_implementation={name!r} was not found; call "
            f"sa_patch.patch_model(model, {str(chosen.pattern)!r}) instead"
        )
    for model in models:
        patch_model(
            model,
            chosen.pattern,
            layers=chosen.schedule,
            decode=chosen.decode,
            backend=chosen.backend,
        )
    if models:
        # A model that makes several masks gives them all the object that was its own before.
        _LEFT[id(config)] = config
        _refuse_what_began_unpatched(name)
    return sparse_mask(**arguments)


def _models_of(config: object) -> list[PreTrainedModel]:
    """The models whose modules run on a configuration object, without what they are wrapped in.

    transformers hands its masks no more than that object. Looking for its holders among all objects
    takes a few tenths of a second, once for a model.
    """
    # Not isinstance, which would ask proxies for their class.
    every = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)]
    running = {id(each) for each in every if each.__dict__.get("config") is config}
    holding = {
        id(each): each for each in every if any(id(part) in running for part in each.modules())
    }
    inside = {id(part) for each in holding.values() for part in each.modules() if part is not each}
    return [each for key, each in holding.items() if key not in inside]


def _refuse_what_began_unpatched(name: str) -> None:
    """Raise `UserError` where `generate` began before it could be told how to read the prompt."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        pieces: Any = ()
        if frame.f_code.co_name == "_prefill":
            pieces = frame.f_locals.get("input_chunks", ())
        single = len(pieces) > 0 and pieces[-1].shape[-1] == 1
        if single or frame.f_code.co_name == "_assisted_decoding":
            raise UserError(
                f"the first use of a model under attn_implementation={name!r} cannot be assisted "
                "decoding, or a prompt whose last chunk is a single token, for it is patched in "
                "its first forward pass; it is patched now: call it again"
            )
        frame = frame.f_back
