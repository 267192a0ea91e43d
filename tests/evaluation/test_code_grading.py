import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.evaluation.code_grading import (
    CodeEval,
    Limits,
    offline_code_eval,
    pass_at_k,
    run_candidate,
)

QUICK = Limits(seconds=1.0, memory_mb=256)


def product_over_draws(samples: int, correct: int, k: int) -> float:
    """1 - P(all k draws without replacement are wrong), draw by draw."""
    all_wrong = 1.0
    for draw in range(k):
        all_wrong *= max(0, samples - correct - draw) / (samples - draw)
    return 1.0 - all_wrong


def test_pass_at_k_is_the_chance_of_a_correct_draw() -> None:
    for samples in range(1, 12):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                expected = product_over_draws(samples, correct, k)
                assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(1, 2, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(samples: int, correct: int, k: int) -> None:
    with pytest.raises(UserError, match="pass@"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import os\nassert os.listdir('.') == []\nopen('scratch', 'w').write('x')",
        "import os\nassert not [name for name in os.environ if 'TOKEN' in name]",
        # A thread that never ends: the tests are done all the same.
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "import numpy as np\nassert np.ones((9, 9)).dot(np.ones(9)).sum() == 81",
    ],
)
def test_a_program_that_reaches_its_end_passes(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_candidate(program, Limits(seconds=20.0)) == "passed"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(0)", "left with exit status 0 before its tests were done"),
        ("import sys; sys.exit(0)", "left with exit status 0 before its tests were done"),
        ("print('passed'); 1 / 0", "ZeroDivisionError"),
        ("print('passed', flush=True); import os; os._exit(0)", "passed"),
        ("[0] * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append('a' * 10**6 + str(len(x)))", "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**8)", "File too large"),
        ("import signal; signal.raise_signal(signal.SIGSEGV)", "killed by SIGSEGV"),
        ("input()", "EOFError"),
        ("import os; os.fork()", "TypeError"),
        ("import os; os.kill(os.getppid(), 9)", "TypeError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = '\ud800'", "UnicodeDecodeError"),
    ],
)
def test_any_other_end_fails_and_says_why(program: str, why: str) -> None:
    result = run_candidate(program, Limits(seconds=20.0, memory_mb=256))
    assert result.startswith("failed: ")
    assert why in result


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_a_program_that_does_not_end_is_killed(program: str) -> None:
    assert run_candidate(program, QUICK) == "timed out"


def test_children_of_a_candidate_die_with_it(tmp_path: Path) -> None:
    # The guard takes away os.fork; posix_spawn is a way round it.
    beacon = tmp_path / "beacon"
    child = f"import time; time.sleep(1.5); open({str(beacon)!r}, 'w').write('alive')"
    program = (
        "import os, sys, time\n"
        f"os.posix_spawn(sys.executable, [sys.executable, '-I', '-c', {child!r}], {{}})\n"
    )
    assert run_candidate(program, QUICK) == "passed"
    assert run_candidate(program + "time.sleep(100)", QUICK) == "timed out"
    assert run_candidate("import time; time.sleep(100)", Limits(seconds=2.0)) == "timed out"
    assert not beacon.exists()


def test_compute_has_the_interface_of_the_hub_metric() -> None:
    scores, results = CodeEval().compute(
        references=["assert add(2, 3) == 5", "assert one() == 1"],
        predictions=[
            ["def add(a, b): return a * b", "def add(a, b): return a + b"],
            ["def one(): return 1", "def one(): return 1"],
        ],
        k=[1, 2, 10],
    )
    assert scores == {"pass@1": 0.75, "pass@2": 1.0}
    assert [[outcome["passed"] for _, outcome in results[i]] for i in (0, 1)] == [
        [False, True],
        [True, True],
    ]
    assert results[0][1] == (
        1,
        {"task_id": 0, "passed": True, "result": "passed", "completion_id": 1},
    )


def test_an_integer_k_and_no_problems() -> None:
    assert CodeEval().compute(references=["pass"], predictions=[["x = 1"]], k=1)[0] == {
        "pass@1": 1.0
    }
    assert CodeEval().compute(references=[], predictions=[]) == ({}, {})


@pytest.mark.parametrize(
    ("references", "predictions", "timeout"),
    [(["pass"], [], 3.0), (["pass"], [["x = 1"]], 0.0), (["pass"], [["x = 1"]], -1.0)],
)
def test_compute_refuses_bad_input(
    references: Sequence[str], predictions: Sequence[Sequence[str]], timeout: float
) -> None:
    with pytest.raises(UserError):
        CodeEval().compute(references=references, predictions=predictions, timeout=timeout)


def test_only_the_name_code_eval_is_replaced_and_only_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import evaluate

    def stock(path: str, **kwargs: object) -> str:
        return f"stock {path}"

    monkeypatch.setattr(evaluate, "load", stock)
    with pytest.raises(RuntimeError), offline_code_eval():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        assert evaluate.load("bleu") == "stock bleu"
        raise RuntimeError
    assert evaluate.load is stock


PROBLEM = {
    "task_id": "Test/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


def test_lm_evals_own_humaneval_runs_offline_with_its_flag_and_not_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Writes(LM):
        def __init__(self, completions: list[str]) -> None:
            super().__init__()
            self.completions = completions

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [self.completions[request.doc_id] for request in requests]

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            raise AssertionError

        loglikelihood_rolling = loglikelihood

    folder = tmp_path / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    problems = [PROBLEM, PROBLEM | {"task_id": "Test/1"}]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent / "humaneval"
    manager = TaskManager(include_path=str(stock), include_defaults=False)
    model = Writes([PROBLEM["canonical_solution"], "    return x\n"])
    arguments = {"model": model, "task_manager": manager, "bootstrap_iters": 0}
    with offline_code_eval():
        task = manager.load(["humaneval"])["tasks"]["humaneval"]
    with pytest.raises(ValueError, match="unsafe"):
        simple_evaluate(tasks=[task], **arguments)
    results = simple_evaluate(tasks=[task], confirm_run_unsafe_code=True, **arguments)
    assert results["results"]["humaneval"]["pass@1,create_test"] == 0.5
