"""The lm-eval model `sa-patch`: a Hugging Face causal LM with a patched prefill attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.evaluation.metering.pattern_meter import HeadShape, PatternMeter
from sa_patch.evaluation.prompt_cutting import CutPromptsLM
from sa_patch.evaluation.request_cache import claim, fingerprint
from sa_patch.evaluation.shared_contexts import caches_keys_alone
from sa_patch.kernels import Spans, check_backend
from sa_patch.kernels.counting import counting_backends, served_by
from sa_patch.models.embedded import resolve_model
from sa_patch.models.gguf import reading_gguf_once
from sa_patch.models.half_products import widen_products
from sa_patch.models.layer_check import check_layers
from sa_patch.models.loading import quickest_source, tokenizer_folder
from sa_patch.patching import (
    Layers,
    Schedule,
    check_decode,
    layer_branches,
    layer_patterns,
    observe_layers,
    patch_model,
    stock_patterns,
)
from sa_patch.patching.layers import base_model
from sa_patch.patterns import Full, Pattern, make_pattern, parse_pattern, with_seed
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.registry import is_text_form

# Encoded requests that are remembered: a sweep asks the same ones of every pattern.
_REMEMBERED_PAIRS = 1 << 17


@register_model("sa-patch")
class SAPatchLM(CutPromptsLM):
    """lm-eval's `hf` model with a sparse prefill attention.

    Scores do not depend on the batch size; see `padded_batches`.

    Args:
        pretrained: hub id, local folder, a .gguf file, "smollm2-135m" for the embedded model, or
            a model object. One with gated attention (`sa_patch.training`) is used as it was
            trained, and takes no method but full.
        pattern: a pattern, its text form, or its name, whose parameters are then the arguments up
            to `grouped`. Beside a text form `seed` may stand, and is that of all its random parts.
            In ``--model_args``, where commas separate arguments, semicolons separate its parameters
            (``pattern=sinks:4+moba:block_size=16;topk=4``).
        method: the same.
        window, seed, topk, block_size, circular, per_head, sinks, local, branch, beam, grouped:
            see `sa_patch.patterns`.
        layers: see `sa_patch.patch_model`; or the path of a schedule file (``.yaml``). In
            ``--model_args`` ``layers=0-3+7`` means layers 0 to 3, and 7.
        decode, backend: see `sa_patch.patch_model`.
        batch_tokens: most tokens of a log-likelihood batch, padding counted; long requests then
            share smaller batches than `batch_size`. The logits of a batch take
            ``batch_tokens * vocabulary`` numbers.
        hf_arguments: everything that lm-eval's `hf` model takes (``batch_size``, ``dtype``,
            ``device``, ``gguf_file``, ``device_map``, ...).

    Raises:
        UserError: for a bad argument, before the model is loaded.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "smollm2-135m",
        *,
        method: str | None = None,
        window: int | None = None,
        seed: int | None = None,
        topk: int | None = None,
        block_size: int | None = None,
        circular: bool | None = None,
        per_head: bool | None = None,
        sinks: int | None = None,
        local: int | None = None,
        branch: int | None = None,
        beam: int | None = None,
        grouped: bool | None = None,
        pattern: Pattern | str | None = None,
        layers: Layers = None,
        decode: str = "full",
        backend: str = "auto",
        batch_tokens: int | None = None,
        **hf_arguments: Any,
    ) -> None:
        params = {
            "window": window,
            "seed": seed,
            "topk": topk,
            "block_size": block_size,
            "circular": circular,
            "per_head": per_head,
            "sinks": sinks,
            "local": local,
            "branch": branch,
            "beam": beam,
            "grouped": grouped,
        }
        chosen = _read_pattern(pattern, method, params)
        check_backend(backend)
        check_decode(decode)
        schedule = read_layers(layers)
        if batch_tokens is not None:
            whole_number(batch_tokens, "batch_tokens", 1)
            if str(hf_arguments.get("batch_size", "")).startswith("auto"):
                raise UserError(
                    "batch_tokens bounds batches of a known size; give batch_size a number beside "
                    "it, or leave batch_tokens out"
                )
        self.batch_tokens = batch_tokens
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        if isinstance(pretrained, str):
            source = resolve_model(
                pretrained, hf_arguments.pop("gguf_file", None), hf_arguments.get("revision")
            )
            check_layers(source, schedule.named)
            self._weights = source.identity
            if (folder := tokenizer_folder(source)) is not None:
                hf_arguments.setdefault("tokenizer", folder)
            source = quickest_source(source)
            pretrained = source.pretrained
            if source.gguf_file is not None:
                hf_arguments["gguf_file"] = source.gguf_file
            if source.revision is not None:
                hf_arguments["revision"] = source.revision
        # lm-eval's own default is "cuda", there or not.
        if hf_arguments.get("device") is None:
            hf_arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        # Under the same name lm-eval has an option of its own: which of its code paths to take.
        with reading_gguf_once():
            super().__init__(pretrained=pretrained, backend="causal", **hf_arguments)
        if isinstance(pretrained, str):  # a model of the caller's stays as it is
            widen_products(self.model)
        if not self._weights:
            self._weights = fingerprint(base_model(self.model))
        self._share_work()
        self.use_pattern(chosen, layers=schedule, decode=decode, backend=backend)

    # Stands for the weights of the model.
    _weights = ""
    # Set while lm-eval tries batch sizes.
    _probing = False
    verbose = False
    """Whether to say on standard error, after the first requests, what served them and how fast."""

    def use_pattern(
        self,
        pattern: Pattern,
        *,
        layers: Layers = None,
        decode: str = "full",
        backend: str = "auto",
    ) -> None:
        """Patch the loaded model with another pattern and start a new meter.

        Raises:
            UserError: see `sa_patch.patch_model`.
        """
        model = base_model(self.model)
        schedule = Schedule.read(layers)
        patch_model(model, pattern, layers=schedule, decode=decode, backend=backend)
        self.pattern = pattern
        self._identity = f"{pattern} layers={schedule.to_plain()} decode={decode} backend={backend}"
        patterns = layer_patterns(model)
        branches = layer_branches(model)
        each = [*patterns.values(), *(part for own in branches.values() for part in own)]
        self._generates_in_full = decode == "full" or all(isinstance(p, Full | None) for p in each)
        self._unstable = next((p for p in each if p and not p.prefix_stable), None)
        self._check_distributed()
        if getattr(self, "cache_hook", None) is not None:
            self._own_cache(self.cache_hook)
        self.meter = PatternMeter(
            {**patterns, **branches}, HeadShape.of(model.config), stock_patterns(model)
        )
        observe_layers(model, self._observe, self.meter.sampled_layers)

    def _observe(self, layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        if not (self._probing or self._behind_context):
            with self.meter.clock.paused():
                self.meter.observe(layer, q, k, spans)

    def _model_call(self, *arguments: Any, **named: Any) -> Tensor:
        if self._probing:
            logits: Tensor = super()._model_call(*arguments, **named)
            return logits
        with self.meter.clock.running():
            logits = super()._model_call(*arguments, **named)
        return logits

    def _detect_batch_size(self, *arguments: Any, **named: Any) -> int:
        """lm-eval's trial of batch sizes, which must not enter the measurements."""
        self._probing = True
        rows, self._rows = self._rows, None
        try:
            return int(super()._detect_batch_size(*arguments, **named))
        finally:
            self._probing, self._rows = False, rows

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's request cache, if it holds no answers of another pattern or model.

        Raises:
            UserError: otherwise; the cache is keyed by the request alone.
        """
        self._own_cache(cache_hook)
        super().set_cache_hook(cache_hook)

    def _own_cache(self, cache_hook: CacheHook) -> None:
        reading = f"max_length={self.max_length} add_bos_token={self.add_bos_token}"
        claim(cache_hook, f"{self._weights} {self.model.dtype} {reading} {self._identity}")

    def _share_work(self) -> None:
        """Take this process's share of the requests under `accelerate launch` on CPUs too.

        lm-eval splits them only where a machine has several GPUs; elsewhere every process would
        do all the work.
        """
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:
            self._rank: int = accelerator.process_index
            self._world_size: int = accelerator.num_processes

    def _check_distributed(self) -> None:
        accelerator = getattr(self, "accelerator", None)
        if accelerator is None or self._unstable is None:
            return
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UserError(
                f"{self._unstable.name} cannot be evaluated under FSDP, whose processes must run "
                "equally many batches; use data-parallel processes or device_map='auto'"
            )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, remembered: encoding takes longer than a small model's forward pass."""
        pair = (context, continuation)
        found = self._encoded.get(pair)
        if found is None:
            if len(self._encoded) >= _REMEMBERED_PAIRS:
                self._encoded.clear()
            found = self._encoded[pair] = super()._encode_pair(context, continuation)
        return found

    @property
    def padding_is_harmless(self) -> bool:
        return self._unstable is None and not self.meter.observed_layers

    @property
    def contexts_can_be_shared(self) -> bool:
        accelerator = getattr(self, "accelerator", None)
        # Its processes must run equally many batches, whatever questions each of them has.
        in_step = accelerator and accelerator.distributed_type == DistributedType.FSDP
        keys = caches_keys_alone(base_model(self.model))
        return self.padding_is_harmless and not in_step and keys

    @contextmanager
    def _counting_time(self) -> Iterator[None]:
        with self.meter.clock.running():
            yield

    def loglikelihood(self, *arguments: Any, **named: Any) -> list[tuple[float, bool]]:
        with self._telling_once():
            answers: list[tuple[float, bool]] = super().loglikelihood(*arguments, **named)
        return answers

    def loglikelihood_rolling(self, *arguments: Any, **named: Any) -> list[float]:
        with self._telling_once():
            answers: list[float] = super().loglikelihood_rolling(*arguments, **named)
        return answers

    def generate_until(self, *arguments: Any, **named: Any) -> list[str]:
        with self._telling_once():
            answers: list[str] = super().generate_until(*arguments, **named)
        return answers

    @contextmanager
    def _telling_once(self) -> Iterator[None]:
        if not self.verbose:
            yield
            return
        with counting_backends() as calls:
            yield
        self.verbose = False
        spent = self.meter.summary()
        seconds = spent["model_seconds"]
        rate = f" at {spent['tokens'] / seconds:,.0f} a second" if seconds else ""
        print(f"{served_by(calls)}; prompts of {spent['tokens']:,} tokens{rate}", file=sys.stderr)

    @property
    def generates_in_full(self) -> bool:
        return self._generates_in_full

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's description of the model, with the pattern in it."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"sa_patch_pattern": self._identity}


def _read_pattern(
    pattern: Pattern | str | None, method: str | None, params: dict[str, Any]
) -> Pattern:
    given = [name for name, value in params.items() if value is not None]
    if pattern is not None and method is not None:
        raise UserError(
            f"pattern= and method= mean the same; give one of them (got {str(pattern)!r} and "
            f"{method!r})"
        )
    chosen = pattern or method or ("sa" if given else "full")
    if isinstance(chosen, str) and not is_text_form(chosen):
        return make_pattern(chosen, **params)
    if given not in ([], ["seed"]):
        raise UserError(
            f"{str(chosen)!r} has its parameters already: only seed= may stand beside it (got "
            f"{', '.join(given)}); within a text form parameters are separated by semicolons"
        )
    chosen = parse_pattern(chosen) if isinstance(chosen, str) else chosen
    return with_seed(chosen, params["seed"]) if given else chosen
