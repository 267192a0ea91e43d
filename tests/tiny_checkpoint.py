"""A tiny random model saved with a tokenizer, as a folder that every command can be pointed at."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sa_patch.files.packaged import tasks_dir
from tests.small_models import tiny_model

SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the words of our needle task as one token each; nothing is downloaded."""
    words = re.findall(r"\w+", (tasks_dir() / "needle" / "needle.py").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny_checkpoint(
    folder: Path, family: str = "llama", *, chat: bool = False, **options: Any
) -> Path:
    """Write a float32 model of `family` with room for 2,048 positions into `folder`.

    With `chat` its tokenizer has a chat template; `options` go to the model's configuration.
    """
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=2048, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
