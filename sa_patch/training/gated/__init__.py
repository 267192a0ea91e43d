"""Gated SA + SWA: two sparse branches over one q, k and v."""
