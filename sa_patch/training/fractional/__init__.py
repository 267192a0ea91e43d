"""Fractional neural attention: weights that fall as a power law of distance."""
