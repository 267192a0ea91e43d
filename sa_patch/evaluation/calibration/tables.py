"""A calibration for people: the layers by harm, and the schedules side by side."""

from __future__ import annotations

from rich.table import Table

from sa_patch.evaluation.calibration.measurement import Calibration, Loss
from sa_patch.patching import format_layers


def layer_table(found: Calibration) -> Table:
    """Every candidate and how much the loss rises when it alone goes sparse, most first."""
    kinds = _kinds(found.full)
    table = Table(title="rise of the loss when one layer alone goes sparse, nats a token")
    for name in ("layer", "rise", *kinds):
        table.add_column(name, justify="right")
    table.add_column("schedule")
    for layer in sorted(found.rises, key=lambda layer: -found.rises[layer].mean):
        rise = found.rises[layer]
        kept = "full" if layer in found.schedules["calibrated"] else "sparse"
        each = [f"{rise.by_kind[kind]:+.4f}" for kind in kinds]
        table.add_row(str(layer), f"{rise.mean:+.4f}", *each, kept)
    return table


def rival_table(found: Calibration) -> Table:
    """The losses of schedules with equally many full layers, on the held-out documents."""
    kinds = _kinds(found.full)
    table = Table(title="loss of schedules on held-out documents, nats a token")
    for name in ("schedule", "full layers"):
        table.add_column(name)
    for name in ("loss", *kinds):
        table.add_column(name, justify="right")
    for name, loss in found.held_out.items():
        kept = found.schedules.get(name)
        shown = "all" if name == "full" else format_layers(kept or ()) or "none"
        each = [f"{loss.by_kind[kind]:.4f}" for kind in kinds]
        table.add_row(name, shown, f"{loss.mean:.4f}", *each)
    return table


def _kinds(loss: Loss) -> list[str]:
    """The kinds of documents, where there are several to tell apart."""
    return list(loss.by_kind) if len(loss.by_kind) > 1 else []
