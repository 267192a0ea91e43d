"""Run folders for tests: real files in the real schema, with made-up (seeded) numbers."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_patch.sweep.cells import SCHEMA, cell_id

# name -> (metric, chance, full attention's score, mean prompt length)
TASKS: dict[str, tuple[str, float | None, float, int]] = {
    "hellaswag": ("acc_norm,none", 0.25, 0.36, 105),
    "mmlu": ("acc,none", 0.25, 0.30, 190),
    "arc_easy": ("acc_norm,none", 0.25, 0.51, 34),
    "arc_challenge": ("acc_norm,none", 0.25, 0.28, 40),
    "boolq": ("acc,none", 0.5, 0.56, 150),
    "lambada_openai": ("acc,none", 0.0, 0.31, 83),
    "humaneval": ("pass@1,create_test", 0.0, 0.08, 160),
    "needle": ("acc,none", 0.25, 0.95, 500),
    "stdlib_perplexity": ("word_perplexity,none", None, 10.4, 1024),
}
SEVEN = tuple(TASKS)[:7]
COMPARED = ("sa", "swa", "moba")


class RunBuilder:
    """Collects cells, then writes ``manifest.json`` and ``cells/`` as a sweep does."""

    def __init__(self, path: Path, **defaults: Any) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}
        self.unwritten: list[str] = []
        self.defaults = defaults

    def add(
        self,
        pattern: str,
        task: str,
        value: float,
        *,
        stderr: float | None = None,
        samples: int | None = 50,
        saturated: float = 0.0,
        mean_keys: float | None = None,
        share: float = 0.5,
        status: str = "done",
        written: bool = True,
        scores: Mapping[str, float] | None = None,
        **setting: Any,
    ) -> str:
        """One cell; ``setting`` overrides parts of its identity, ``scores`` adds metrics to the
        main one. Returns its id."""
        metric, chance, _, prompt = TASKS[task]
        parameters = _parameters(pattern)
        window = parameters.get("window")
        if "block_size" in parameters:
            window = parameters["block_size"] * parameters["topk"]
        cell = {
            "model": "sha256:" + "ab" * 32,
            "model_name": "smollm2-135m",
            "pattern": pattern,
            "method": pattern.split(":")[0],
            "window": window,
            "seed": parameters.get("seed"),
            "layers": None,
            "decode": "full",
            "backend": "auto",
            "dtype": "float32",
            "task": task,
            "task_version": 1.0,
            "limit": 50,
            "num_fewshot": 0,
            "gen_kwargs": {},
            **self.defaults,
            **setting,
        }
        identifier = cell_id(cell)
        done = status == "done"
        keys = prompt / 2 if mean_keys is None else mean_keys
        full_flops = 1e6 * prompt**2
        data = {
            "schema": SCHEMA,
            "id": identifier,
            "cell": cell,
            "status": status,
            "error": None if done else "RuntimeError: out of memory",
            "scores": {metric: value, **(scores or {})} if done else None,
            "primary": {
                "metric": metric,
                "value": value,
                "stderr": stderr,
                "higher_is_better": "perplexity" not in metric,
                "chance": chance,
            }
            if done
            else None,
            "samples": samples if done else None,
            "measured": {
                "sequences": 200,
                "tokens": 200 * prompt,
                "prompt_lengths": {"min": prompt - 10, "mean": float(prompt), "max": prompt + 10},
                "mean_keys_per_query": keys,
                "last_query_keys": 1.5 * keys,
                "attention_flops": 200 * share * full_flops,
                "full_attention_flops": 200 * full_flops,
                "visited_keys": {"16": 0.5 * prompt * (1 + share) / 2},
                "full_visited_keys": {"16": 0.5 * prompt},
                "saturated_fraction": saturated,
                "model_seconds": 200 * 0.01 * share,
            }
            if done
            else None,
            "started": "2026-11-22T18:00:00Z",
            "seconds": 12.3,
        }
        self.files[identifier] = data
        if not written:
            self.unwritten.append(identifier)
        return identifier

    def write(self, **manifest: Any) -> Path:
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "name": "test",
            "started": "2026-11-22T18:00:00Z",
            "ended": "2026-11-22T18:20:00Z",
            "command": ["sa-patch", "sweep", "test.yaml"],
            "versions": {"python": "3.12.1", "torch": "2.13.0", "lm_eval": "0.4.13", "gguf": None},
            "git": {"commit": "0123456789abcdef", "dirty": True},
            "hardware": {
                "cpu": "Test CPU",
                "cores": 2,
                "memory_gib": 7.6,
                "gpus": [],
                "cuda": None,
            },
            "config": {},
            "planned": list(self.files),
            "sessions": [],
            **manifest,
        }
        (self.path / "manifest.json").write_text(json.dumps(content))
        for identifier, data in self.files.items():
            if identifier not in self.unwritten:
                (self.path / "cells" / f"{identifier}.json").write_text(json.dumps(data))
        return self.path


def plausible_run(
    path: Path,
    tasks: Sequence[str],
    windows: Sequence[int] = (16, 32, 64, 128, 256, 512),
    seeds: Sequence[int] = (0, 1, 2),
    topks: Sequence[int] = (2,),
    extra: Sequence[str] = (),
    **defaults: Any,
) -> Path:
    """A whole sweep: full, SA, SWA and MoBA (and the patterns ``extra``, with ``{w}`` for the
    window), scores rising towards full attention's as the window nears the prompt length."""
    builder = RunBuilder(path, **defaults)
    rng = random.Random(1)
    patterns = ["full"]
    for window in windows:
        patterns += [f"sa:window={window},seed={seed}" for seed in seeds]
        patterns += [f"swa:window={window}"]
        patterns += [f"moba:block_size={window // topk},topk={topk}" for topk in topks]
        patterns += [text.format(w=window) for text in extra]
    for pattern in patterns:
        for task in tasks:
            builder.add(pattern, task, **_made_up(pattern, task, rng))
    return builder.write()


def paper_grid(folder: Path) -> list[Path]:
    """Two models on seven tasks and their average, 43 points each."""
    return [
        plausible_run(
            folder / name,
            SEVEN,
            windows=(16, 32, 64, 128, 256, 512, 1024),
            topks=(2, 4, 8),
            extra=["psa:window={w},seed=0"],
            model_name=f"Qwen/{name}",
        )
        for name in ("Qwen3-8B", "Qwen3-30B-A3B")
    ]


def _made_up(pattern: str, task: str, rng: random.Random) -> Mapping[str, Any]:
    _, chance, best, prompt = TASKS[task]
    method, parameters = pattern.split(":")[0], _parameters(pattern)
    if method == "full":
        stderr = 0.03 if chance is not None else 0.4
        return {"value": best, "stderr": stderr, "saturated": 1.0, "share": 1.0}
    window = parameters.get("window") or parameters["block_size"] * parameters["topk"]
    seen = min(1.0, window / (0.8 * prompt))
    skill = seen ** {"sa": 0.3, "swa": 0.7, "moba": 0.4}.get(method, 0.5)
    noise = rng.gauss(0, 0.015) if seen < 1 else 0.0
    keys = min(window * 0.9, prompt / 2)
    measured = {
        "mean_keys": keys,
        "share": keys / (prompt / 2) * (1.1 if method == "moba" else 1.0),
        "saturated": 1.0 if seen >= 1 else 0.1,
    }
    if chance is None:
        value = best * (1 / skill) ** 4 * (1 + noise)
        return {"value": value, "stderr": 0.05 * value, **measured}
    value = min(max(chance * (1 - skill) + best * skill + noise, 0.0), 1.0)
    return {"value": value, "stderr": (value * (1 - value) / 49) ** 0.5, **measured}


def _parameters(pattern: str) -> dict[str, Any]:
    pairs = (pair.split("=", 1) for pair in pattern.partition(":")[2].split(",") if "=" in pair)
    return {key: int(value) for key, value in pairs if value.lstrip("-").isdigit()}
