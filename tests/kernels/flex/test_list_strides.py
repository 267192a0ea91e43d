"""FlexAttention's GPU kernel reads the list of full blocks by the strides of the other list.

No CPU shows it: full attention was wrong on an H200 while the two lists were of different widths.
"""

from __future__ import annotations

import pytest
import torch

from sa_patch.kernels.flex.blocks import window_blocks
from sa_patch.kernels.flex.parts import _call


@pytest.mark.parametrize("window", [1, 100, 300, 1000], ids=str)
@pytest.mark.parametrize("sinks", [0, 200])
def test_both_lists_of_a_call_have_the_same_strides(window: int, sinks: int) -> None:
    k = torch.zeros(1, 1, 1000, 32)
    *_, call = _call(None, lambda: window_blocks(1000, window, 64, sinks), k, k, 1.0, False)
    assert len(call.lists) == 4
    assert call.lists[1].stride() == call.lists[3].stride()
    assert call.lists[0].stride() == call.lists[2].stride()
