"""The benchmark's options, for command lines; without torch, so that --help is immediate."""

from __future__ import annotations

OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("n", "LIST", "lengths, such as 1024,2048 or 1K,2K (default: 1K to 16K; on CUDA 2K to 128K)"),
    ("heads", "COUNT", "query heads (default: 8; on CUDA 32)"),
    ("kv-heads", "COUNT", "KV heads (default: 2; on CUDA 8)"),
    ("head-dim", "WIDTH", "width of a head (default: 64; on CUDA 128)"),
    ("window", "LIST", "windows of the methods that name none (default: 256)"),
    ("methods", "LIST", "sa, swa, moba, full, or text forms such as moba:block_size=512,topk=3"),
    ("backends", "LIST", "backends to measure (default: all)"),
    ("dtype", "NAME", "float32, bfloat16 or float16 (default: float32; on CUDA bfloat16)"),
    ("device", "NAME", "cpu or cuda (default: cuda where torch sees one)"),
    ("threads", "COUNT", "torch threads (default: torch's own)"),
    ("batch", "ROWS", "sequences in a batch (default: 1)"),
    ("repeats", "COUNT", "most repetitions of a cell (default: 15; on CUDA 30)"),
    ("budget", "SECONDS", "time for the whole run (default: 270)"),
    ("out", "DIR", "folder of the results (default: runs/bench)"),
    ("seed", "NUMBER", "of inputs, sampled queries and the order of calls (default: 0)"),
)
