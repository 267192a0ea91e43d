"""LongBench, LongBench v2 and InfiniteBench by lm-eval's files, on data laid out like the hub's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks import catalogue
from sa_patch.sweep.config import load_config
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.run import run_sweep
from tests.sweep.small_sweep import results, sweep_of
from tests.tiny_checkpoint import save_tiny_checkpoint

TEXT = "The teacher found the old table in the garden in the morning. " * 30
QA = {"context": TEXT, "question": "Where?", "answers": ["garden"], "all_classes": []}
CHOICE = {"context": TEXT, "question": "Where?", "choices": ["a", "b", "c", "d"], "answer": 2}
OPTIONS = ["a", "b", "c", "d"]
BOOK = {"id": 0, "context": TEXT, "input": "Which?", "answer": ["b"], "options": OPTIONS}
TASKS = (
    "longbench_lcc",
    "longbench_qasper",
    "longbench2_graph",
    "infinitebench_longbook_choice_en",
)


@pytest.fixture(autouse=True)
def only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index the three folders alone: all of lm-eval's take seconds."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in ("longbench", "longbench2", "infinitebench")]
    manager = TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(catalogue, "_every_task", lambda _: manager)


def write_data(
    folder: Path, name: str, parts: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]
) -> None:
    """A hub repository's copy: for each configuration its split, and the split's rows."""
    root = folder / name
    root.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, (split, rows) in parts.items():
        file = f"{config}.jsonl"
        (root / file).write_text("\n".join(map(json.dumps, rows)))
        card += [f"- config_name: {config}", "  data_files:", f"  - split: {split}"]
        card += [f"    path: {file}"]
    (root / "README.md").write_text("\n".join([*card, "---"]))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_data(
        folder,
        "Xnhyacinth/LongBench",
        {"lcc": ("test", [QA] * 2), "qasper": ("test", [QA] * 2)},
    )
    write_data(folder, "recursal/longbench-v2", {"graph_reasoning": ("train", [CHOICE] * 2)})
    write_data(
        folder, "xinrongzhang2022/InfiniteBench", {"default": ("longbook_choice_eng", [BOOK] * 2)}
    )
    return folder


def test_they_run_with_a_chat_and_with_prompts_cut_in_the_middle(
    benchmarks: Path, tmp_path: Path
) -> None:
    chat = save_tiny_checkpoint(tmp_path / "chat", chat=True)
    config = sweep_of(
        chat,
        methods=["full", "sinks:4+swa:60"],
        tasks=[{"task": task} for task in TASKS],
        gen_kwargs={"max_gen_toks": 4},
        truncation="middle",
        max_prompt_tokens=200,
        apply_chat_template=True,
        system_instruction="Be brief.",
    )
    plan = make_plan(config, benchmarks=benchmarks)
    outcome = run_sweep(config, plan, tmp_path / "run")
    cells = list(results(tmp_path / "run").values())
    assert outcome.exit_status == 0, [cell["error"] for cell in cells]
    assert (outcome.ran, {cell["cell"]["task"] for cell in cells}) == (8, {*TASKS})
    for cell in cells:
        longest = 200 if cell["cell"]["gen_kwargs"] else 200 + 1
        assert 200 <= cell["measured"]["prompt_lengths"]["max"] <= longest
        assert cell["primary"]["metric"].split(",")[0] in ("score", "acc")
        assert cell["cell"]["data"] and cell["cell"]["system_instruction"] == "Be brief."


@pytest.mark.parametrize("name", ["longbench", "longbench2", "infinitebench"])
def test_the_packaged_configurations_name_tasks_that_there_are(name: str) -> None:
    config = load_config(name)
    plan = make_plan(config)
    assert {cell.cell["truncation"] for cell in plan.cells} == {"middle"}
    assert len(plan.cells) == len(config.tasks) * len(config.methods)


def test_a_missing_package_is_named_before_a_model(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs jieba and fuzzywuzzy and rouge; .*longbench"):
        make_plan(sweep_of(checkpoint, tasks=["longbench_lcc"]))
