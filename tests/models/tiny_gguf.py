"""A GGUF file of a model small enough to be loaded in each test."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

WIDTH, INNER, HEADS, LAYERS = 64, 96, 2, 2
# How a byte-level vocabulary (GPT-2's, Qwen's) writes the 256 bytes.
LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
WORDS = ["th", "the", "Ġt", "Ġth", "Ġthe"]
MERGES = ["t h", "th e", "Ġ t", "Ġt h", "Ġth e"]


def write_tiny_gguf(path: Path, seed: int = 0, family: str = "qwen2") -> Path:
    """Write a model of two layers, its matrices in Q8_0, with a byte-level vocabulary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, family)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    tokens = [*LETTERS, *WORDS, "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_vocab_size(len(tokens))
    draw = np.random.default_rng(seed)
    for name, shape in _shapes(len(tokens)).items():
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    own = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm.weight": (WIDTH,),
            "ffn_norm.weight": (WIDTH,),
            "attn_q.weight": (WIDTH, WIDTH),
            "attn_q.bias": (WIDTH,),
            "attn_k.weight": (own, WIDTH),
            "attn_k.bias": (own,),
            "attn_v.weight": (own, WIDTH),
            "attn_v.bias": (own,),
            "attn_output.weight": (WIDTH, WIDTH),
            "ffn_gate.weight": (INNER, WIDTH),
            "ffn_up.weight": (INNER, WIDTH),
            "ffn_down.weight": (WIDTH, INNER),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    return shapes
