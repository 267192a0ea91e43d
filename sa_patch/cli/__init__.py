"""The ``sa-patch`` command: parse, call, print."""
