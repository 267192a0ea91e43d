"""`torch.compile` and `torch.export`: a prefill is one graph, our attention an operator in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from sa_patch import SA, SWA, MoBA, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns, operator
from sa_patch.patching.documents import NO_DOCUMENT
from sa_patch.patterns import Pattern, Sinks
from tests.small_models import PAD, random_tokens, tiny_model
from tests.thorough import unless_thorough

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

    @property
    def operators(self) -> int:
        """Attention operators of ours in all graphs."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return sum("sa_patch.attention" in str(node.target) for node in nodes)

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
        compiled = torch.compile(model, fullgraph=True, backend=recorder)
    else:
        compiled = torch.compile(model, fullgraph=True, backend=recorder)
        torch.testing.assert_close(logits(compiled), stock)
        assert patch_model(compiled, pattern) is compiled
    assert layer_patterns(compiled) == dict.fromkeys(range(2), pattern)
    sparse = logits(model)
    assert not torch.allclose(sparse, stock, atol=1e-2)
    torch.testing.assert_close(logits(compiled), sparse)
    assert recorder.operators == 2

    # Padding is nothing that a graph knows of: no other one compiles anything anew.
    known = len(recorder.graphs)
    other = MASK.flip(1)
    torch.testing.assert_close(logits(compiled, other), logits(model, other))
    assert len(recorder.graphs) == known
    patch_model(compiled, SA(3, seed=9))
    assert not torch.allclose(logits(model), sparse, atol=1e-2)
    torch.testing.assert_close(logits(compiled), logits(model))

    assert unpatch_model(compiled) is compiled
    assert torch.equal(logits(model), stock)
    torch.testing.assert_close(logits(compiled), stock)
    with patched(compiled, pattern):
        torch.testing.assert_close(logits(compiled), sparse)
    assert torch.equal(logits(model), stock)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0], [1]], ids=["sparse", "stock"])
def test_keys_that_a_model_chose_itself_are_refused_in_graphs_too(layers: list[int]) -> None:
    model = patch_model(tiny_model("qwen3"), SWA(4), layers=layers)
    compiled = torch.compile(model, backend=Recorder())
    with pytest.raises(UserError, match="layer 0 .* chooses keys itself"):
        compiled(TOKENS, indices=torch.zeros(1, dtype=torch.int64))


PACKED = torch.cat([torch.arange(7), torch.arange(13)])[None].expand(2, -1)
# The calls whose graphs differ.
CALLS: dict[str, dict[str, Any]] = {
    "cache": {},
    "padding": {"attention_mask": MASK, "use_cache": False},
    "packed": {"position_ids": PACKED, "use_cache": False},
}


def at_length(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    """The arguments of a call for the last n tokens."""
    return {key: x[:, -n:] if isinstance(x, Tensor) else x for key, x in arguments.items()}


@pytest.mark.parametrize("call", unless_thorough(["packed"], list(CALLS)))
@torch.no_grad()
def test_a_prefill_is_one_graph_for_every_length(call: str) -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), Sinks(2) | SA(4))
    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    for n in (20, 16, 13):
        arguments, tokens = at_length(CALLS[call], n), TOKENS[:, -n:]
        real = arguments.get("attention_mask", torch.ones_like(tokens)).bool()
        expected = model(tokens, **arguments).logits
        assert (compiled(tokens, **arguments).logits - expected)[real].abs().max() <= 1e-5, n
    # The first length alone, and then any.
    assert len(recorder.graphs) == recorder.operators == 2


def test_what_no_graph_can_hold_is_said() -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), SWA(4), decode="pattern")
    compiled = torch.compile(model, fullgraph=True, backend=Recorder())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True out"):
        compiled(TOKENS)
    with pytest.raises(UserError, match="masks other than causal"):
        operator.layout(torch.full((1, 4), NO_DOCUMENT))


def test_a_compiled_model_trains_as_uncompiled() -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), Sinks(2) | SA(4))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(TOKENS, labels=TOKENS, **CALLS["packed"]).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for compiled, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exported_prefill_is_saved_loaded_and_takes_any_length(tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), SA(4))
    arguments = CALLS["padding"]
    length = {1: torch.export.Dim("n", min=3, max=512)}
    shapes = {"input_ids": length, "attention_mask": length, "use_cache": None}
    exported = torch.export.export(model, (TOKENS,), arguments, dynamic_shapes=shapes, strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (20, 17):
        given, tokens = at_length(arguments, n), TOKENS[:, -n:]
        difference = loaded(tokens, **given).logits - model(tokens, **given).logits
        assert difference[given["attention_mask"].bool()].abs().max() <= 1e-5


def test_inductor_compiles_a_patched_model() -> None:
    model = tiny_model("qwen3", num_hidden_layers=1)
    stock = logits(model)
    compiled = torch.compile(patch_model(model, SA(4)), fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), atol=2e-4, rtol=1e-4)
    assert torch.equal(logits(unpatch_model(model)), stock)


def greedy(model: PreTrainedModel, **options: Any) -> Tensor:
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    tokens: Tensor = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=14, **options)
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
    assert recorder.graphs
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
    # Generated tokens alone are compiled.
    assert recorder.graphs and not recorder.operators
