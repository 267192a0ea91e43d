"""Loading: hub ids, folders, GGUF files and the embedded model."""
