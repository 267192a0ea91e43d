"""Half-precision linear layers through float32: torch's results, and only where they are slow."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.models import half_products
from sa_patch.models.half_products import (
    DTYPES,
    FEW_ROWS,
    LEAST_ROWS,
    WidenedLinear,
    widen_products,
)
from sa_patch.models.loading import load_pretrained

MANY = LEAST_ROWS + 3


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "multiplies_slowly", lambda dtype: dtype in DTYPES)


def layers(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """The same layer as torch's and as ours."""
    torch.manual_seed(0)
    own = nn.Linear(96, 40, bias=bias).to(dtype).requires_grad_(False)
    ours = copy.deepcopy(own)
    ours.__class__ = WidenedLinear
    return own, ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, MANY])
@pytest.mark.parametrize("at_once", [1, 7 * 96, 2**24])
def test_sums_are_rounded_once(
    dtype: torch.dtype, bias: bool, rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_products, "NUMBERS_AT_ONCE", at_once)
    monkeypatch.setattr(half_products, "NUMBERS_IN_CACHE", at_once)
    own, ours = layers(dtype, bias)
    x = torch.randn(2, rows, 96).to(dtype)
    exact = nn.functional.linear(
        x.double(), own.weight.double(), own.bias.double() if bias else None
    )
    found = ours(x)
    assert (found.dtype, found.shape) == (dtype, (2, rows, 40))
    # Half a unit in the last place, and what float32's sums are off by.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-4
    assert (found.double() - exact).abs().le(allowed).all()
    torch.testing.assert_close(found, own(x), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("rows", [MANY, FEW_ROWS + 1])
def test_a_row_does_not_depend_on_others(rows: int) -> None:
    """Law 1 in the last bit: what comes later in a prompt changes nothing before it."""
    _, ours = layers(torch.bfloat16)
    x = torch.randn(1, rows, 96).bfloat16()
    changed = x.clone()
    changed[:, -1] = 7.0
    assert torch.equal(ours(changed)[:, :-1], ours(x)[:, :-1])


def test_float32_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    linear = nn.functional.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = linear(x, weight, bias)
        sizes.extend([weight.numel(), result.numel()])
        return result

    _, ours = layers(torch.bfloat16)
    monkeypatch.setattr(half_products, "NUMBERS_IN_CACHE", 96 * 5)
    monkeypatch.setattr(half_products, "NUMBERS_AT_ONCE", 96 * 20)
    monkeypatch.setattr(nn.functional, "linear", noted)
    for rows, most in ((FEW_ROWS, 96 * 5), (FEW_ROWS + 1, 96 * 20), (20 * MANY, 96 * 20)):
        sizes.clear()
        ours(torch.randn(rows, 96).bfloat16())
        assert len(sizes) >= 4 and most / 2 < max(sizes) <= most


def test_few_rows_gradients_autocast_and_other_types_are_torchs_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear, types = nn.functional.linear, []

    def noted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        types.append(x.dtype)
        return linear(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", noted)
    own, ours = layers(torch.bfloat16)
    x = torch.randn(MANY, 96).bfloat16()
    ours(x[: LEAST_ROWS - 1])
    for layer in (own, ours):
        layer.requires_grad_()
        layer(x).square().sum().backward()
    assert own.weight.grad is not None and ours.weight.grad is not None
    assert torch.equal(ours.weight.grad, own.weight.grad)
    assert set(types) == {torch.bfloat16}
    with torch.no_grad():
        ours(x)
        assert types[-1] == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert ours(x).dtype == torch.float16
        with pytest.raises(RuntimeError, match="dtype"):
            ours(x.float())


@pytest.mark.usefixtures("slow_cpu")
def test_a_model_changes_in_its_half_precision_linear_layers_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"short": nn.Linear(8, 8), "single": nn.Linear(8, 8), "own": Own(8, 8)})
    model["short"].to(torch.bfloat16)
    model["own"].to(torch.bfloat16)
    before = dict(model.state_dict())
    assert widen_products(model) == 1
    assert [type(layer) for layer in model.values()] == [WidenedLinear, nn.Linear, Own]
    assert all(
        held is before[name] or torch.equal(held, before[name])
        for name, held in model.state_dict().items()
    )
    assert isinstance(copy.deepcopy(model)["short"], WidenedLinear)
    assert widen_products(model) == 0


@pytest.mark.usefixtures("slow_cpu")
def test_loaded_models_have_them(checkpoint: Path) -> None:
    for model in (
        load_pretrained(str(checkpoint), dtype="bfloat16")[0],
        SAPatchLM(str(checkpoint), dtype="bfloat16", device="cpu").model,
    ):
        assert any(isinstance(module, WidenedLinear) for module in model.modules())
    single, tokenizer = load_pretrained(str(checkpoint))
    assert not any(isinstance(module, WidenedLinear) for module in single.modules())
    # A model that the caller loaded is the caller's.
    single.to(torch.bfloat16)
    held = SAPatchLM(single, tokenizer=tokenizer, device="cpu").model
    assert not any(isinstance(module, WidenedLinear) for module in held.modules())


def test_a_cpu_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"bf16": True, "fp16": False}
    for name, answer in said.items():
        monkeypatch.setattr(
            torch.ops.mkldnn,
            f"_is_mkldnn_{name}_supported",
            lambda answer=answer: answer,
            raising=False,
        )
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert [half_products.multiplies_slowly(dtype) for dtype in DTYPES] == [False, True]
    assert not half_products.multiplies_slowly(torch.float32)
    # Elsewhere torch has products of its own, which nobody has timed.
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert not any(map(half_products.multiplies_slowly, DTYPES))
