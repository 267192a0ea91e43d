"""A model whose heads two processes share, as `tp_plan="auto"` spreads them."""

import re
from pathlib import Path

import pytest

from sa_patch import patch_model
from sa_patch.errors import UserError
from tests.patching.tensor_parallel import TEXTS
from tests.processes import launch_two
from tests.small_models import random_tokens, tiny_model
from tests.thorough import THOROUGH

REPOSITORY = Path(__file__).parents[2]


def test_a_share_of_the_heads_cannot_draw_for_each() -> None:
    model = patch_model(tiny_model("llama"), "sinks:2+psa:4,per_head=true")
    model(random_tokens(1, 12))
    # As a module finds it whose projections are spread over two processes.
    model.config.num_attention_heads = 8
    with pytest.raises(UserError, match="layer 0 has 4 of 8 heads here"):
        model(random_tokens(1, 12))
    patch_model(model, "sinks:2+psa:4")(random_tokens(1, 12))


@pytest.mark.skipif(not THOROUGH, reason="two processes take 17 s of a core to start")
def test_shared_heads_see_what_they_see_in_one_process_or_say_why_not(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    printed = launch_two("-m", "tests.patching.tensor_parallel", str(tmp_path), cwd=REPOSITORY)
    for text in TEXTS:
        differences = re.findall(rf"^{re.escape(text)} (\S+)$", printed, re.M)
        assert len(differences) == 2
        assert max(map(float, differences)) <= 1e-4
    # SA draws for a head by its number among all, which a share of them cannot tell.
    assert printed.count("per head: layer 0 has 2 of 4 heads here") == 2
