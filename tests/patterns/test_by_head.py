"""A pattern for each KV head is, head by head, that head's own pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_patch import patch_model, sparse_attention
from sa_patch.errors import UserError
from sa_patch.kernels.backend import Softmax
from sa_patch.kernels.visited_keys import visited_keys
from sa_patch.patterns import (
    SA,
    SWA,
    BlockTopK,
    ByHead,
    Full,
    MoBA,
    Sinks,
    XAttention,
    fit_budget,
    flops_share,
    parse_pattern,
    seed_of,
    with_seed,
)
from sa_patch.patterns.rivals.by_head import _in_order
from sa_patch.report.variants import by_budget
from tests.laws.strategies import Case, make_case
from tests.small_models import random_tokens, tiny_model

MIXED = [
    ByHead((Full(), Sinks(2) | SWA(5), Full())),
    ByHead((SWA(4), SA(4, seed=3), Sinks(1) | MoBA(4, 2))),
    ByHead((BlockTopK(2, 2, 2, 0, shared=2, segment=4), XAttention(4, 3, stride=2), SWA(3))),
]
N = 60


def case_of(**given: Any) -> Case:
    return make_case(**({"q_heads": 6, "kv_heads": 3, "seq_len": N, "head_dim": 16} | given))


def of_kv_head(case: Case, head: int) -> Case:
    q, k, v = case.q[:, 2 * head : 2 * head + 2], case.k, case.v
    return Case(q, k[:, head : head + 1], v[:, head : head + 1], case.lengths, case.layer)


@pytest.mark.parametrize("backend", ["auto", "reference", "banded"])
@pytest.mark.parametrize("pattern", MIXED, ids=str)
def test_each_head_is_served_by_its_own_pattern(pattern: ByHead, backend: str) -> None:
    case = case_of(batch=2, lengths=[N, 41], layer=2)
    expected = [
        of_kv_head(case, head).run(own, backend) for head, own in enumerate(pattern.patterns)
    ]
    assert (case.run(pattern, backend) - torch.cat(expected, 1)).abs().max() <= 1e-5
    case = case_of(layer=2)
    sink = torch.linspace(-1, 2, 6)
    whole = sparse_attention(case.q, case.k, case.v, pattern, layer=2, sink=sink)
    alone = of_kv_head(case, 1)
    own = sparse_attention(alone.q, alone.k, alone.v, pattern.patterns[1], layer=2, sink=sink[2:4])
    assert (whole[:, 2:4] - own).abs().max() <= 1e-5


@pytest.mark.parametrize("pattern", MIXED, ids=str)
def test_what_it_tells_is_what_its_heads_tell(pattern: ByHead) -> None:
    case = case_of()
    content: dict[str, Any] = {"heads": 6, "q": case.q[0], "k": case.k[0]}
    places = torch.arange(N)
    seen = pattern.visible(places, N, **content)
    for head, own in enumerate(pattern.patterns):
        q, k = case.q[0, 2 * head : 2 * head + 2], case.k[0, head : head + 1]
        of_head = own.visible(places, N, heads=2, q=q, k=k)
        assert torch.equal(seen[2 * head : 2 * head + 2], of_head.expand(2, -1, -1))
    assert torch.equal(pattern.view(N, **content)(8, 20), seen[:, 8:20, :20])
    some = torch.arange(12, 16)
    asked = content | {"q": pattern.queries_read(case.q[0], some)}
    assert torch.equal(pattern.visible(some, N, **asked), seen[:, 12:16])
    mean = torch.stack([own.keys_per_query(N) for own in pattern.patterns]).mean(0)
    assert torch.allclose(pattern.keys_per_query(N), mean)
    shares = [flops_share(own, N, 2) for own in pattern.patterns]
    assert flops_share(pattern, N, 2) == pytest.approx(sum(shares) / 3)
    found = visited_keys(pattern, N, heads=6, kv_heads=3, q=case.q[0], k=case.k[0])
    each = [
        visited_keys(
            own, N, heads=2, kv_heads=1, q=case.q[0, 2 * h : 2 * h + 2], k=case.k[0, h, None]
        )
        for h, own in enumerate(pattern.patterns)
    ]
    assert found.keys[16] == pytest.approx(sum(one.keys[16] for one in each) / 3)
    assert pattern.saturated(N) == all(own.saturated(N) for own in pattern.patterns)


def test_counts_and_seeds() -> None:
    counts = MIXED[0].count_visible(N, heads=6)
    assert torch.equal(counts[2:4], (Sinks(2) | SWA(5)).count_visible(N).expand(2, -1))
    assert torch.equal(counts[5], torch.arange(1, N + 1))
    assert seed_of(MIXED[0]) is None and seed_of(MIXED[1]) == 3
    assert with_seed(MIXED[1], 8) == ByHead((SWA(4), SA(4, seed=8), Sinks(1) | MoBA(4, 2)))


@pytest.mark.parametrize("pattern", MIXED, ids=str)
def test_text_forms_read_back_and_unions_are_made_head_by_head(pattern: ByHead) -> None:
    assert parse_pattern(str(pattern)) == pattern
    united = SWA(9) | pattern | Sinks(3)
    assert isinstance(united, ByHead)
    assert united.patterns == tuple(SWA(9) | own | Sinks(3) for own in pattern.patterns)
    assert by_budget(str(pattern)).label.startswith("by head")


def test_families_of_a_budget() -> None:
    family = "heads{1*full|2*sinks:4+swa:{}}"
    found = fit_budget(family, 256, 0.6)
    windows = [w for w in range(1, 256) if parse_pattern(family.replace("{}", str(w))) == found]
    larger = parse_pattern(family.replace("{}", str(windows[0] + 1)))
    assert flops_share(found, 256) <= 0.6 < flops_share(larger, 256)


def test_in_a_model_layer_by_layer() -> None:
    model, tokens = tiny_model("qwen3"), random_tokens(2, 40)
    kv_heads = model.config.num_key_value_heads
    own = ByHead((Full(), *[SWA(4)] * (kv_heads - 1)))
    with torch.no_grad():
        full, narrow = model(tokens).logits, patch_model(model, SWA(4))(tokens).logits
        mixed = patch_model(model, layers={0: str(own), 1: own})(tokens).logits
        alike = patch_model(model, ByHead((SWA(4),) * kv_heads))(tokens).logits
    assert (alike - narrow).abs().max() <= 2e-4
    assert (mixed - narrow).abs().max() > 0.01 and (mixed - full).abs().max() > 0.01
    with pytest.raises(
        UserError, match=f"is for 7 KV heads, and this model's layers have {kv_heads}"
    ):
        patch_model(model, ByHead((SWA(4),) * 7))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("heads{}", "a part of the union|is written name"),
        ("heads{0*full}", "not of the form NUMBER\\*PATTERN"),
        ("heads{x*full}", "not of the form NUMBER\\*PATTERN"),
        ("heads{1*full|2*sa:4,per_head=true}", "must be the same for all heads"),
        ("heads{1*full|2*swaa:4}", "did you mean 'swa'"),
    ],
)
def test_bad_texts_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_pattern(text)


def test_another_number_of_heads_is_refused() -> None:
    case = make_case(seq_len=9)
    with pytest.raises(UserError, match="is for 3 KV heads, and here are 4 query heads"):
        case.run(MIXED[0], "auto")


class Indexed(TorchDispatchMode):
    """Operations that take an index, and tensors made of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in ("index", "lift_fresh", "_to_copy", "argsort")):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_heads_are_taken_without_an_index() -> None:
    """A list as an index would be copied to a GPU, which waits, several times in every layer."""
    # Heads of one pattern that do not follow each other, and an order to restore.
    pattern = ByHead((Full(), SWA(N), Full()))
    case = case_of()
    sink = torch.linspace(-1, 2, 6)
    with Indexed() as indexed:
        parts = list(pattern.split(6, case.q, case.k))
        told = [(mine, content["q"][0]) for _, mine, content in parts]
        own = Softmax(None, sink).of_heads(parts[0][1]).sink
        whole = _in_order(told)
        sparse_attention(case.q, case.k, case.v, pattern, sink=None, backend="banded")
    assert not indexed.found
    assert torch.equal(parts[0][2]["k"], case.k[:, [0, 2]]) and own is not None
    assert torch.equal(own, sink[[0, 1, 4, 5]]) and torch.equal(whole, case.q[0])
