"""Names of tasks, what their YAML says, and local copies of data sets."""

import json
import os
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks.benchmarks import Benchmarks, working_directory
from sa_patch.evaluation.tasks.catalogue import Catalogue


@pytest.fixture(scope="module")
def everything() -> Catalogue:
    """lm-eval's own tasks and ours; indexing them takes seconds."""
    return Catalogue(["hellaswag", "needle"])


def test_our_tasks_say_what_stands_for_them() -> None:
    catalogue = Catalogue(["needle_128", "stdlib_perplexity", "needle"])
    needle = catalogue.info("needle_128")
    assert (needle.primary_metric, needle.chance) == ("acc", 0.125)
    group = catalogue.info("needle")
    assert (group.primary_metric, group.chance, group.datasets) == ("acc", 0.125, ())
    # Its version names the Python whose sources are read: no path of this machine may be in it.
    version = catalogue.info("stdlib_perplexity").version
    assert isinstance(version, str) and os.sep not in version and "python3." in version


def test_an_unknown_task_is_refused_with_near_names(everything: Catalogue) -> None:
    with pytest.raises(UserError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        everything.require("helaswag")


@pytest.mark.parametrize(
    ("name", "metric", "chance", "datasets"),
    [
        ("hellaswag", "acc_norm", 0.25, ("Rowan/hellaswag",)),
        ("arc_easy", "acc_norm", 0.25, ("allenai/ai2_arc",)),
        ("boolq", "acc", 0.5, ("aps/super_glue",)),
        ("lambada_openai", "acc", 0.0, ("EleutherAI/lambada_openai",)),
        ("mmlu", "acc", 0.25, ("cais/mmlu",)),
        ("humaneval", "pass@1", 0.0, ("openai/openai_humaneval",)),
        ("humaneval_instruct", "pass@1", 0.0, ("openai/openai_humaneval",)),
    ],
)
def test_the_papers_tasks(
    everything: Catalogue, name: str, metric: str, chance: float, datasets: tuple[str, ...]
) -> None:
    info = everything.info(name)
    assert (info.primary_metric, info.chance, info.datasets) == (metric, chance, datasets)
    assert info.runs_code == info.generates == name.startswith("humaneval")


@pytest.mark.parametrize(
    ("name", "metric"),
    [("humaneval_plus", "pass@1"), ("humaneval_64", "pass@2"), ("mbpp", "pass_at_1")],
)
def test_a_function_names_its_scores(everything: Catalogue, name: str, metric: str) -> None:
    assert everything.info(name).primary_metric == metric


def test_examples_in_the_prompt(everything: Catalogue) -> None:
    assert everything.info("hellaswag").num_fewshot(None) == 0
    assert everything.info("hellaswag").num_fewshot(5) == 5
    # humaneval's own file says 0, which lm-eval never changes.
    assert everything.info("humaneval").num_fewshot(5) == 0


def test_a_tag_stands_for_its_tasks(everything: Catalogue) -> None:
    assert {"arc_easy", "arc_challenge"} <= set(everything.members("ai2_arc"))
    assert everything.members("mmlu") == ["mmlu"]


def test_the_working_directory_comes_back(tmp_path: Path) -> None:
    before = Path.cwd()
    with pytest.raises(RuntimeError), working_directory(tmp_path):
        assert Path.cwd() == tmp_path.resolve()
        raise RuntimeError
    assert Path.cwd() == before
    with working_directory(None):
        assert Path.cwd() == before


def make_arc(folder: Path) -> Path:
    """A local copy of a data set, laid out like its hub repository; returns its test split."""
    root = folder / "allenai" / "ai2_arc"
    (root / "ARC-Easy").mkdir(parents=True)
    rows = [
        {
            "id": str(index),
            "question": f"What is {index} + 1?",
            "choices": {"text": [str(index + 1), str(index + 2)], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for index in range(6)
    ]
    splits = ("train", "validation", "test")
    for split in splits:
        (root / "ARC-Easy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = "".join(f"  - split: {each}\n    path: ARC-Easy/{each}.jsonl\n" for each in splits)
    card = f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n"
    (root / "README.md").write_text(card)
    return root / "ARC-Easy" / "test.jsonl"


def test_lm_evals_own_file_reads_a_local_copy(everything: Catalogue, tmp_path: Path) -> None:
    make_arc(tmp_path)
    loaded = everything.load(everything.info("arc_easy"), tmp_path)
    assert len(loaded["tasks"]["arc_easy"].eval_docs) == 6


def test_local_data_enter_the_identity_of_a_cell(everything: Catalogue, tmp_path: Path) -> None:
    split = make_arc(tmp_path)
    info = everything.info("arc_easy")
    first = Benchmarks(tmp_path).digest(info.name, info.datasets)
    assert first == Benchmarks(tmp_path).digest(info.name, info.datasets)
    split.write_text("{}")
    assert Benchmarks(tmp_path).digest(info.name, info.datasets) != first
    assert Benchmarks(tmp_path).digest("needle", ()) is None


def test_missing_local_data_is_named(everything: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no Rowan/hellaswag, which task 'hellaswag' reads"):
        Benchmarks(tmp_path).digest("hellaswag", ["Rowan/hellaswag"])
    with pytest.raises(UserError, match="no benchmarks folder at"):
        Benchmarks(tmp_path / "nowhere")


def test_a_changed_copy_is_read_anew(everything: Catalogue, tmp_path: Path) -> None:
    """The data sets' own cache would give what it read first under this name."""
    info = everything.info("arc_easy")
    counts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        file = make_arc(folder)
        if folder.name == "b":
            file.write_text(file.read_text().splitlines()[0])
        task = everything.load(info, folder)["tasks"]["arc_easy"]
        counts.append(len(list(task.test_docs())))
    assert counts == [6, 1]
