"""What the prefills of a patched model see, read and cost."""
