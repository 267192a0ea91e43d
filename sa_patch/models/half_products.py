"""Linear layers in bfloat16 and float16 on CPUs for which torch has no such products.

On an x86 CPU without AVX-512 (float16: without instructions of its own) torch multiplies these
matrices dot product by dot product, at a sixth of float32's speed and less. Here the numbers are
widened to float32, which changes none of them, multiplied by float32's own routines, and the sums
rounded once. As before, only the order of the sums is torch's own affair.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16)
# From how many rows on widening the weights pays (`scripts/bench_half_products`).
LEAST_ROWS = 4
# Most weights, and most results, that stand in float32 at once: 64 MiB of each, where those of a
# vocabulary take ten times that and more. For few rows, whose time is that of reading weights, so
# many that they stay in a cache.
NUMBERS_AT_ONCE = 2**24
FEW_ROWS = 32
NUMBERS_IN_CACHE = 2**20


class WidenedLinear(nn.Linear):
    """A linear layer whose products are float32's, and whose weights and results stay as they are.

    Where gradients are asked for, under autocast, on another device and for few rows it is torch's
    own layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not self._pays(input):
            return super().forward(input)
        wide = input.float()
        result = input.new_empty(*input.shape[:-1], self.out_features)
        rows = input.numel() // self.in_features
        at_once = NUMBERS_IN_CACHE if rows <= FEW_ROWS else NUMBERS_AT_ONCE
        step = max(1, at_once // max(self.in_features, rows))
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            bias = None if self.bias is None else self.bias[part].float()
            result[..., part] = nn.functional.linear(wide, self.weight[part].float(), bias)
        return result

    def _pays(self, input: Tensor) -> bool:
        weight = self.weight
        return (
            input.dtype == weight.dtype in DTYPES
            and weight.device.type == input.device.type == "cpu"
            and input.numel() >= LEAST_ROWS * self.in_features
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad))
        )


def widen_products(model: nn.Module) -> int:
    """Give a model's half-precision linear layers on the CPU `WidenedLinear`'s products.

    Weights, names and state dicts stay. Where torch has products of the type, on other
    devices and for layers of other classes (a mixture's experts among them) nothing changes.

    Returns:
        How many layers were changed.
    """
    slow = {dtype for dtype in DTYPES if multiplies_slowly(dtype)}
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype in slow
        and module.weight.device.type == "cpu"
    ]
    for layer in layers:
        layer.__class__ = WidenedLinear
    return len(layers)


def multiplies_slowly(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU is an x86 one for which torch has no products of the type."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    if name is None or supported is None or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not supported()
