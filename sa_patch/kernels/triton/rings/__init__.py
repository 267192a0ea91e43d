"""Tokens on a ring, of stochastic attention and its prefix-stable kin: plans and their kernel."""
