"""`torch.compile`, before and after patching: our attention stays outside of the graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import sa_patch
from sa_patch import SA, SWA, MoBA, patch_model, patched, unpatch_model
from sa_patch.patching import layer_patterns
from sa_patch.patterns import Pattern, Sinks
from tests.small_models import PAD, random_tokens, tiny_model

TOKENS = random_tokens(2, 20)
MASK = torch.ones_like(TOKENS).index_fill_(1, torch.arange(6), 0)
MASK[1] = 1


class Recorder:
    """A compiler that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        run: Callable[..., Any] = graph.forward
        return run

    def holds_our_code(self) -> bool:
        """Whether a tensor of any graph is made by a line of ours."""
        assert self.graphs, "nothing was compiled"
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        made = [
            node.stack_trace or ""
            for node in nodes
            if node.op != "placeholder" and isinstance(node.meta.get("example_value"), Tensor)
        ]
        assert any("modeling_" in trace for trace in made), "lines are known"
        package = str(Path(sa_patch.__file__).parent)
        return any(package in trace for trace in made)

    def __deepcopy__(self, _: Any) -> Recorder:
        """Itself: generation copies its configuration, the compiler's with it."""
        return self


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def logits(model: Any, mask: Tensor = MASK) -> Tensor:
    """Logits of the real tokens of both rows, one after the other."""
    real: Tensor = model(TOKENS, attention_mask=mask).logits[mask.bool()]
    return real


@pytest.mark.parametrize(
    ("order", "pattern", "family", "options"),
    [
        ("patched first", SA(4), "llama", {}),
        # A window of its own, which has no effect yet: so its mask function is tried.
        ("compiled first", MoBA(4, 2), "mistral", {"sliding_window": 64}),
    ],
    ids=str,
)
def test_compiled_models_give_the_same_logits(
    order: str, pattern: Pattern, family: str, options: dict[str, Any]
) -> None:
    model = tiny_model(family, num_hidden_layers=2, **options)
    stock = logits(model)
    recorder = Recorder()
    if order == "patched first":
        patch_model(model, pattern)
        compiled = torch.compile(model, backend=recorder)
    else:
        compiled = torch.compile(model, backend=recorder)
        torch.testing.assert_close(logits(compiled), stock)
        assert patch_model(compiled, pattern) is compiled
    assert layer_patterns(compiled) == dict.fromkeys(range(2), pattern)
    sparse = logits(model)
    assert not torch.allclose(sparse, stock, atol=1e-2)
    torch.testing.assert_close(logits(compiled), sparse)
    assert not recorder.holds_our_code()

    # Padding and pattern are nothing that a graph knows of: no other one compiles anything anew.
    known = len(recorder.graphs)
    other = MASK.flip(1)
    torch.testing.assert_close(logits(compiled, other), logits(model, other))
    patch_model(compiled, SA(3, seed=9))
    assert not torch.allclose(logits(model), sparse, atol=1e-2)
    torch.testing.assert_close(logits(compiled), logits(model))
    assert len(recorder.graphs) == known

    assert unpatch_model(compiled) is compiled
    assert torch.equal(logits(model), stock)
    torch.testing.assert_close(logits(compiled), stock)
    with patched(compiled, pattern):
        torch.testing.assert_close(logits(compiled), sparse)
    assert torch.equal(logits(model), stock)


def test_inductor_compiles_a_patched_model() -> None:
    model = tiny_model("qwen3", num_hidden_layers=1)
    stock = logits(model)
    compiled = torch.compile(patch_model(model, SA(4)))
    torch.testing.assert_close(logits(compiled), logits(model), atol=2e-4, rtol=1e-4)
    assert torch.equal(logits(unpatch_model(model)), stock)


def greedy(model: PreTrainedModel, **options: Any) -> Tensor:
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    tokens: Tensor = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=36, **options)
    return tokens


def test_a_compiled_forward_writes_the_same_with_a_cache_that_drops_keys() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    stock = greedy(model)
    patch_model(model, Sinks(2) | SWA(4), decode="pattern")
    expected = greedy(model)
    recorder = Recorder()
    compiled: Any = torch.compile(model.forward, backend=recorder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", compiled)
        assert torch.equal(greedy(model), expected)
    assert not recorder.holds_our_code()
    assert torch.equal(greedy(unpatch_model(model)), stock)


@pytest.mark.parametrize("decode", ["full", "pattern"])
def test_generate_compiles_by_itself_with_a_static_cache(decode: str) -> None:
    """As it does on GPUs wherever the cache is static."""
    model = patch_model(tiny_model("llama", num_hidden_layers=1), SWA(4), decode=decode)
    expected = greedy(model)
    recorder = Recorder()
    config = CompileConfig(backend=recorder, mode=None)
    config._compile_all_devices = True
    written = greedy(model, cache_implementation="static", compile_config=config)
    assert torch.equal(written, expected)
    assert not recorder.holds_our_code()
