"""Text from a patched model, for ``sa-patch generate``."""

from __future__ import annotations

import sys

from sa_patch.errors import UserError, choice
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.kernels import check_backend
from sa_patch.kernels.counting import counting_backends, served_by
from sa_patch.models.embedded import resolve_model
from sa_patch.models.layer_check import check_layers
from sa_patch.models.loading import DTYPES, load_causal_lm, load_tokenizer
from sa_patch.patching import check_decode, patch_model
from sa_patch.patterns import Pattern, make_pattern, parse_pattern, with_seed
from sa_patch.patterns.registry import is_text_form, parameters, pattern_class

DEFAULT_WINDOW = 128


def choose_pattern(
    method: str, window: int | None = None, seed: int | None = None, topk: int | None = None
) -> Pattern:
    """The pattern of a method's name and options, or of a text form such as ``sinks:4+sa:64``.

    Beside a text form only a seed may stand, which is then that of all its random parts.

    Raises:
        UserError: for an unknown method, or an option or value that it does not take.
    """
    if is_text_form(method):
        if (window, topk) != (None, None):
            raise UserError(
                f"{method!r} holds the parameters already; leave --window and --topk out"
            )
        pattern = parse_pattern(method)
        return pattern if seed is None else with_seed(pattern, seed)
    if window is None and "window" in parameters(pattern_class(method)):
        window = DEFAULT_WINDOW
    return make_pattern(method, window=window, seed=seed, topk=topk)


def generate_text(
    model: str,
    prompt: str,
    pattern: Pattern,
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    decode: str = "full",
    backend: str = "auto",
    layers: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    verbose: bool = False,
) -> None:
    """Load a model, attend by `pattern`, and print the greedy continuation as it appears.

    Args:
        model: hub id, folder, or ``smollm2-135m``.
        layers: text such as ``"4-35"``, or the path of a schedule file; None for all.
        chat: put the prompt into the tokenizer's chat template.
        verbose: say on standard error which backends served, and how fast.

    Raises:
        UserError: if the model cannot be found, loaded or patched, or has no chat template.
    """
    from sa_patch.evaluation.timed_streamer import TimedStreamer

    if not prompt:
        raise UserError("the prompt is empty; give the text to continue")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    choice(dtype, "dtype", DTYPES)
    check_backend(backend)
    check_decode(decode)
    schedule = read_layers(layers)
    source = resolve_model(model, gguf_file, revision)
    check_layers(source, schedule.named)
    tokenizer = load_tokenizer(model, source)
    loaded = load_causal_lm(model, source, dtype, device_map)
    patch_model(loaded, pattern, layers=schedule, decode=decode, backend=backend)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{model} has no chat template; leave --chat out")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TimedStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    with counting_backends() as calls:
        loaded.generate(
            **inputs.to(loaded.device),
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
    if verbose:
        print(f"{served_by(calls)}; {streamer.rates()}", file=sys.stderr)
