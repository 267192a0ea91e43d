"""``sa-patch calibrate``: which layers to leave full."""
