"""One of two processes that share a model's heads; prints how far its logits are from the whole.

torchrun --nproc-per-node 2 -m tests.patching.tensor_parallel CHECKPOINT
"""

import sys

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from sa_patch import patch_model
from sa_patch.errors import UserError
from tests.small_models import random_tokens

TEXTS = ("sa:4", "moba:4,2", "sinks:2+psa:5")


@torch.no_grad()
def main(checkpoint: str) -> None:
    torch.distributed.init_process_group("gloo")
    shared = AutoModelForCausalLM.from_pretrained(checkpoint, tp_plan="auto").eval()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = random_tokens(2, 24)
    for text in TEXTS:
        logits = [patch_model(model, text)(tokens).logits for model in (shared, whole)]
        print(f"{text} {(logits[0] - logits[1]).abs().max():.1e}")
    try:
        patch_model(shared, "sa:4,per_head=true")(tokens)
    except UserError as error:
        print(f"per head: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
