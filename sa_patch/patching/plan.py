"""What one attention module of a patched model does, and where that is kept: on the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from sa_patch.kernels import Spans
from sa_patch.patching.cache import DropBeyondReach
from sa_patch.patching.reading import Reading
from sa_patch.patching.tile_queries import KeepTileQueries, forget_tile_queries
from sa_patch.patterns import Pattern, parts_of

Observer = Callable[[int, Tensor, Tensor, Spans], None]

_PLAN, _HOOK = "_sa_patch_plan", "_sa_patch_hook"


@dataclass(frozen=True)
class LayerPlan:
    """What one attention module of a patched model does.

    Args:
        pattern: the layer's pattern; None where the layer keeps its stock attention.
        decode: "full" or "pattern", see `sa_patch.patching.patch_model`.
        backend: name of the kernel backend, or "auto".
        stock: the model's attention implementation before it was patched.
        reading: what the forward pass reads, one for all modules of the model.
        observer: called with (layer, q, k, spans) before each sparse attention, with the tensors
            as `sa_patch.kernels.attend` takes them; None for nobody.
        takers: patterns of the later layers that take this one's keys, None for stock attention.

    Attributes:
        text: the pattern's text form.
        draws_by_head: whether the pattern draws for every query head.
    """

    pattern: Pattern | None
    decode: str
    backend: str
    stock: str
    reading: Reading
    observer: Observer | None = None
    takers: tuple[Pattern | None, ...] = ()
    text: str = field(init=False, default="")
    draws_by_head: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        # Written once: a graph in the making cannot.
        object.__setattr__(self, "text", str(self.pattern))
        parts = () if self.pattern is None else parts_of(self.pattern)
        by_head = any(getattr(part, "per_head", False) for part in parts)
        object.__setattr__(self, "draws_by_head", by_head)

    @property
    def reach(self) -> tuple[int, int] | None:
        """(sinks, window) if later queries see no more keys than these; None if they may."""
        sinks = window = 0
        for pattern in (self.pattern, *self.takers):
            reach = None if pattern is None else pattern.bounded_reach
            if reach is None or self.decode == "full":
                return None
            sinks, window = max(sinks, reach[0]), max(window, reach[1])
        return sinks, window

    def hook(self) -> DropBeyondReach | KeepTileQueries | None:
        """What has to see the cache before the module does; None if nothing has to."""
        if self.reach is not None:
            return DropBeyondReach(*self.reach)
        shared = 1 if self.pattern is None else self.pattern.shared_queries
        return KeepTileQueries(shared) if shared > 1 else None


def get_plan(module: nn.Module) -> LayerPlan | None:
    """The plan of an attention module, None if it has none."""
    plan = module.__dict__.get(_PLAN)
    return plan if isinstance(plan, LayerPlan) else None


def set_plan(module: nn.Module, plan: LayerPlan | None) -> None:
    """Give an attention module its plan, or take it away."""
    handle = module.__dict__.pop(_HOOK, None)
    if handle is not None:
        handle.remove()
    forget_tile_queries(module)
    if plan is None:
        module.__dict__.pop(_PLAN, None)
        return
    module.__dict__[_PLAN] = plan
    hook = plan.hook()
    if hook is not None:
        module.__dict__[_HOOK] = module.register_forward_pre_hook(hook, with_kwargs=True)
