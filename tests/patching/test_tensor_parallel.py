"""A model whose heads two processes share, as `tp_plan="auto"` spreads them."""

import re
from pathlib import Path

from tests.patching.tensor_parallel import TEXTS
from tests.small_models import tiny_model
from tests.two_processes import launch_two

REPOSITORY = Path(__file__).parents[2]


def test_shared_heads_see_what_they_see_in_one_process_or_say_why_not(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    printed = launch_two("-m", "tests.patching.tensor_parallel", str(tmp_path), cwd=REPOSITORY)
    for text in TEXTS:
        differences = re.findall(rf"^{re.escape(text)} (\S+)$", printed, re.M)
        assert len(differences) == 2
        assert max(map(float, differences)) <= 1e-4
    # SA draws for a head by its number among all, which a share of them cannot tell.
    assert printed.count("per head: layer 0 has 2 of 4 heads here") == 2
