"""Sweep files: what they mean, and one clear sentence for each mistake."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_patch.errors import UserError
from sa_patch.files.packaged import configs_dir
from sa_patch.patching import Schedule
from sa_patch.patterns import SA, SWA, BlockTopK, Full, MoBA, Sinks
from sa_patch.sweep.config import load_config, parse_config
from sa_patch.sweep.worker_resources import WorkerResources

GRID: dict[str, Any] = {
    "windows": [16, 32],
    "methods": ["full", {"method": "sa", "seeds": [0, 1]}, "swa", {"method": "moba", "topk": 4}],
    "tasks": ["needle_128", {"task": "mmlu", "limit": 2}],
    "limit": 50,
}


def test_the_grid_is_every_window_and_seed_of_every_method() -> None:
    config = parse_config(GRID)
    assert set(config.patterns) == {
        Full(),
        *(SA(window=w, seed=s) for w in (16, 32) for s in (0, 1)),
        *(SWA(window=w) for w in (16, 32)),
        *(MoBA(block_size=w // 4, topk=4) for w in (16, 32)),
    }
    assert [(task.task, task.limit) for task in config.tasks] == [("needle_128", 50), ("mmlu", 2)]
    assert config.models[0].pretrained == "smollm2-135m"


def test_equal_entries_count_once_and_text_forms_are_patterns() -> None:
    config = parse_config(
        {
            **GRID,
            "windows": [16, 16],
            "methods": ["swa", "swa:window=16", "sa:window=8,seed=3", "full", "full"],
            "tasks": ["needle_128", "needle_128"],
        }
    )
    assert config.patterns == (SWA(window=16), SA(window=8, seed=3), Full())
    assert len(config.tasks) == 1


def test_methods_can_have_windows_and_parameters_of_their_own() -> None:
    methods = [
        {"method": "swa", "windows": [4]},
        {"method": "sa", "circular": False},
        {"method": "moba", "block_size": 8, "topk": 3},
    ]
    config = parse_config({**GRID, "windows": 64, "methods": methods})
    assert config.patterns == (
        SWA(window=4),
        SA(window=64, circular=False),
        MoBA(block_size=8, topk=3),
    )


def test_windows_complete_only_the_parameters_that_leave_room_for_them() -> None:
    methods = ["block_topk", {"method": "block_topk", "topk": 3}, {"method": "sinks", "size": 2}]
    config = parse_config({**GRID, "methods": methods, "windows": [32, 64]})
    assert config.patterns == (
        BlockTopK.from_window(32),
        BlockTopK.from_window(64),
        BlockTopK(topk=3),
        Sinks(2),
    )
    without = parse_config({**GRID, "methods": ["block_topk"], "windows": None})
    assert without.patterns == (BlockTopK(),)


def test_every_method_may_have_layers_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("layers: {0-1: full, 2: 'swa:4'}\nfull_layers: 2\n")
    methods = [
        "swa:8",
        {"method": "swa:8", "layers": "1-2"},
        {"method": "swa:8", "layers": str(path)},
        "full",
    ]
    config = parse_config({**GRID, "methods": methods, "layers": [0]})
    mapping = Schedule(own=((0, None), (1, None), (2, SWA(4))))
    assert config.patterns == (SWA(8), Full())
    assert [config.layers_of(method) for method in config.methods] == [
        Schedule(listed=(0,)),
        Schedule(listed=(1, 2)),
        mapping,
        Schedule(listed=(0,)),
    ]
    assert config.to_dict()["layers"] == [0]
    assert config.to_dict()["patterns"][1:3] == [
        {"pattern": "swa:window=8", "layers": [1, 2]},
        {"pattern": "swa:window=8", "layers": {"0-1": "full", "2": "swa:window=4"}},
    ]


def test_a_mapping_for_all_methods_is_not_for_full_attention() -> None:
    config = parse_config({**GRID, "methods": ["full", "swa:8"], "layers": {"0": "swa:2"}})
    full, swa = config.methods
    assert config.layers_of(full) == Schedule()
    assert config.layers_of(swa) == Schedule(own=((0, SWA(2)),))


@pytest.mark.parametrize("text", ["", "0-3", "method: swa"])
def test_a_schedule_file_without_layers_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="schedule.yaml has no key 'layers'"):
        parse_config({**GRID, "layers": str(path)})


def test_settings_of_one_model_and_of_one_task() -> None:
    config = parse_config(
        {
            **GRID,
            "model": {"pretrained": "Qwen/Qwen3-8B", "revision": "main", "device_map": "auto"},
            "dtype": "bfloat16",
            "layers": "4-6,8",
            "gen_kwargs": {"max_gen_toks": 64},
            "tasks": [{"task": "humaneval", "gen_kwargs": {"max_gen_toks": 8}}, "boolq"],
        }
    )
    model = config.models[0]
    assert (model.pretrained, model.dtype, model.revision) == ("Qwen/Qwen3-8B", "bfloat16", "main")
    assert config.layers == Schedule(listed=(4, 5, 6, 8))
    assert [task.gen_kwargs["max_gen_toks"] for task in config.tasks] == [8, 64]


def test_a_model_can_have_resources_of_its_own() -> None:
    models = ["small", {"pretrained": "large", "resources": {"gpus": 4}}]
    config = parse_config({**GRID, "model": models, "resources": {"cpus": 8, "gpus": 0.5}})
    assert [model.resources for model in config.models] == [
        WorkerResources(cpus=8, gpus=0.5),
        WorkerResources(cpus=8, gpus=4),
    ]
    assert parse_config(GRID).models[0].resources == WorkerResources(cpus=1, gpus=None)
    # For the manifest; the hash of a cell does not depend on it, see test_sweep.
    assert config.to_dict()["models"][1]["resources"] == {"cpus": 8, "gpus": 4}


def test_what_a_task_or_model_leaves_out_comes_from_the_file() -> None:
    tasks = [{"task": "a", "limit": None, "gen_kwargs": {"until": ["x"]}}, "b"]
    models = [{"pretrained": "x", "resources": {"gpus": 4}}, {"pretrained": "y", "dtype": "auto"}]
    config = parse_config(
        {
            **{"methods": "full", "tasks": tasks, "model": models, "dtype": "float32"},
            **{"limit": 5, "num_fewshot": 2, "gen_kwargs": {"max_gen_toks": 8}},
            "resources": {"cpus": 8, "gpus": 0.5},
        }
    )
    shown = {"task", "limit", "num_fewshot", "gen_kwargs"}
    assert [task.model_dump(include=shown) for task in config.tasks] == [
        # A list stays one: a cell that is read again is compared with it.
        {
            **{"task": "a", "limit": None, "num_fewshot": 2},
            "gen_kwargs": {"max_gen_toks": 8, "until": ["x"]},
        },
        {"task": "b", "limit": 5, "num_fewshot": 2, "gen_kwargs": {"max_gen_toks": 8}},
    ]
    assert [model.dtype for model in config.models] == ["float32", "auto"]
    assert config.models[0].resources == WorkerResources(cpus=8, gpus=4)


def test_limit_of_the_command_line_is_over_the_files() -> None:
    assert {task.limit for task in parse_config(GRID).with_limit(3).tasks} == {3}
    assert parse_config(GRID).with_limit(None) == parse_config(GRID)
    with pytest.raises(UserError, match="--limit must be a whole number of at least 1, got 0"):
        parse_config(GRID).with_limit(0)


def test_metadata_of_the_command_line_are_over_the_files() -> None:
    tasks = ["a", {"task": "b", "metadata": {"x": 1, "y": 2}}]
    config = parse_config({**GRID, "tasks": tasks}).with_metadata('{"y": [3]}')
    assert [task.metadata for task in config.tasks] == [{}, {"x": 1, "y": [3]}]
    every = parse_config({**GRID, "tasks": ["a", "b"]}).with_metadata('{"y": [3]}')
    assert [task.metadata for task in every.tasks] == [{"y": [3]}] * 2
    assert config.with_metadata(None) == config
    for text, sentence in (
        ("{y", "is no JSON .*max_seq_lengths"),
        ("[1]", "must be a JSON object, got.*max_seq_lengths"),
        ('{"a": NaN}', "must be made of text, finite numbers"),
    ):
        with pytest.raises(UserError, match=f"--metadata {sentence}"):
            config.with_metadata(text)


def test_metadata_are_what_a_cells_file_gives_back() -> None:
    config = parse_config({**GRID, "tasks": [{"task": "a", "metadata": {"x": {1: [2]}}}]})
    assert [task.metadata for task in config.tasks] == [{"x": {"1": [2]}}]


def test_turns_of_a_chat_need_its_template() -> None:
    with pytest.raises(UserError, match="task 'a': fewshot_as_multiturn .* apply_chat_template"):
        parse_config({**GRID, "tasks": ["a"], "fewshot_as_multiturn": True})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"windws": [1]}, "unknown key 'windws' in the sweep file; did you mean 'windows'"),
        ({"windows": [64, 0]}, r"^windows\[1\] must be at least 1, got 0"),
        ({"windows": [-1]}, "at least 1, got -1"),
        ({"windows": [1.5]}, r"^windows\[0\] must be a whole number, got 1.5"),
        ({"windows": "x"}, "must be a whole number, got 'x'"),
        ({"windows": [True]}, "must be a whole number, got True"),
        ({"windows": []}, "the grid is empty: method 'sa' needs 'windows'"),
        ({"methods": []}, "the grid is empty: 'methods'"),
        ({"methods": None}, "the grid is empty: 'methods'"),
        ({"tasks": []}, "the grid is empty: 'tasks'"),
        ({"methods": ["saa"]}, "unknown method 'saa'; did you mean 'sa'"),
        ({"methods": [{"method": "moba", "topk": 0}]}, "topk must be a whole number"),
        ({"methods": [{"method": "moba", "topk": 3}]}, "multiple of topk=3"),
        ({"methods": [{"method": "sa", "sed": 1}]}, "no parameter 'sed'; did you mean 'seed'"),
        ({"methods": [{"method": "swa", "seeds": [1]}]}, "takes no 'seeds'"),
        ({"methods": [{"method": "sinks:4+swa:6", "seeds": [1]}]}, "takes no 'seeds'"),
        ({"methods": [{"method": "swa:6", "window": 4}]}, "unknown key 'window'"),
        (
            {"methods": [{"method": "sa", "seeds": ["x"]}]},
            r"seeds\[0\] must be a whole number, got 'x'",
        ),
        ({"methods": [{"method": "sa", "seeds": [True]}]}, "must be a whole number, got True"),
        ({"methods": [{"method": "split"}]}, "the entry of 'split' lacks the key 'total'"),
        ({"methods": [{"method": "split", "total": 64, "locl": 1}]}, "did you mean 'local'"),
        ({"methods": [{"method": "split", "total": 64, "rest": 5}]}, "rest must be text, got 5"),
        ({"methods": [{"method": "swa", "layers": "x"}]}, "numbers and ranges"),
        ({"methods": [{"method": "full", "layers": [1]}]}, "full attention has no layers"),
        ({"layers": {"0-3": "full", 3: "swa:4"}}, "names layer 3 twice"),
        ({"layers": {"0-3": 5}}, "must be given a pattern"),
        ({"layers": "none.yaml"}, "no schedule file none.yaml"),
        ({"methods": [7]}, "an entry of 'patterns'"),
        ({"methods": [{"name": "sa"}]}, "has a 'pattern' key"),
        ({"methods": ["full"], "patterns": ["sa"]}, "'patterns' and 'methods' mean the same"),
        ({"methods": [{"method": "sa", "pattern": "sa"}]}, "give one of them"),
        ({"tasks": [{"limit": 3}]}, r"'tasks\[0\]' lacks the key 'task'"),
        ({"tasks": [{"task": "boolq", "limt": 3}]}, "unknown key 'limt'.*did you mean 'limit'"),
        ({"limit": 0}, "^limit must be at least 1, got 0"),
        (
            {"tasks": ["a", {"task": "b", "limit": 0}]},
            r"^tasks\[1\].limit must be at least 1, got 0",
        ),
        ({"tasks": {"task": "b", "num_fewshot": -1}}, "num_fewshot must be at least 0, got -1"),
        ({"tasks": {"task": "b", "gen_kwargs": 3}}, "gen_kwargs must be a mapping"),
        ({"model": {"dtype": "float32"}}, r"'model\[0\]' lacks the key 'pretrained'"),
        ({"model": {"pretrained": "x", "revison": "y"}}, "did you mean 'revision'"),
        ({"modle": "x"}, "unknown key 'modle' in the sweep file; did you mean 'model'"),
        ({"models": "x"}, "unknown key 'models' in the sweep file; did you mean 'model'"),
        ({"model": {"pretrained": "x", "dtype": "int8"}}, "unknown dtype 'int8'"),
        ({"name": " "}, "name must be text that is not empty, got ' '"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ({"decode": "sparse"}, "unknown decode 'sparse'"),
        ({"backend": "bandit"}, "unknown backend 'bandit'; did you mean 'banded'"),
        ({"layers": "4-x"}, "layers are written as numbers and ranges"),
        ({"layers": []}, "layers is empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gen_kwargs": 3}, "gen_kwargs must be a mapping"),
        ({"metadata": {"day": date(2024, 1, 1)}}, "metadata must be made of text, finite numbers"),
        ({"gen_kwargs": {"x": float("nan")}}, "gen_kwargs must be made of text, finite"),
        ({"resources": {"gpu": 1}}, "unknown key 'gpu' in 'resources'; did you mean 'gpus'"),
        ({"resources": 4}, "resources must be a mapping of keys to values, got 4"),
        ({"resources": {"cpus": 0}}, "resources.cpus must be at least 1, got 0"),
        ({"resources": {"cpus": 0.5}}, "resources.cpus must be a whole number, got 0.5"),
        ({"resources": {"gpus": -1}}, "whole number, or a fraction below 1, got -1"),
        ({"resources": {"gpus": 1.5}}, "a fraction below 1, got 1.5"),
        ({"resources": {"gpus": True}}, "resources.gpus must be a number, got True"),
        ({"resources": {"gpus": float("nan")}}, "resources.gpus must be a finite number, got nan"),
        ({"resources": {"gpus": "two"}}, "resources.gpus must be a number, got 'two'"),
        (
            {"model": {"pretrained": "x", "resources": {"gpus": 3.5}}},
            r"^model\[0\].resources.gpus must be .*below 1, got 3.5",
        ),
    ],
)
def test_mistakes_are_named_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse_config({**GRID, **change})
    assert "\n" not in str(caught.value)


def test_files_are_found_by_path_or_packaged_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GRID))
    assert load_config(str(path)).name == "mine"
    assert load_config("demo").name == "demo"
    with pytest.raises(UserError, match="no sweep file 'dmo'; did you mean 'demo'"):
        load_config("dmo")
    with pytest.raises(UserError, match="is a folder"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("text", ["a: [1", "- just\n- a list", "", "\t:"])
def test_a_file_that_is_no_mapping_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_every_packaged_sweep_is_valid() -> None:
    found = sorted(configs_dir().glob("*.yaml"))
    assert {path.stem for path in found} >= {"demo", "smollm2-seven", "qwen3-8b", "qwen3-30b-a3b"}
    for path in found:
        assert load_config(str(path)).name == path.stem


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b", "smollm2-seven"])
def test_the_papers_grid(name: str) -> None:
    config = load_config(name)
    windows = (16, 32, 64, 128, 256, 512)
    assert set(config.patterns) == {
        Full(),
        *(SWA(window=w) for w in windows),
        *(SA(window=w, seed=s) for w in windows for s in (0, 1, 2)),
        *(MoBA(block_size=w // 2, topk=2) for w in windows),
    }
    assert sorted(task.task for task in config.tasks) == sorted(
        ["hellaswag", "mmlu", "arc_easy", "arc_challenge", "boolq", "lambada_openai", "humaneval"]
    )


def test_patterns_and_methods_are_one_word() -> None:
    shared = {"windows": [16], "tasks": ["needle_128"]}
    older, newer = (
        parse_config(
            {**shared, f"{word}s": ["full", {word: "sa", "seeds": [0, 1]}, {word: "swa:8"}]}
        )
        for word in ("method", "pattern")
    )
    assert newer == older
