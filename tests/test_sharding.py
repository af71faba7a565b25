"""Where an engine keeps gradients of its own, ours join those it steps by, or the run ends."""

import pytest
import torch

from axolotl_asft.errors import AsftError
from axolotl_asft.sharding import add_to_gradients


def test_a_gradient_that_deepspeed_does_not_step_by_is_refused():
    """Its BF16_Optimizer leaves the parameter's own gradient, which its helpers then read and write in vain."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    parameter._hp_mapping = object()  # as ZeRO marks a parameter
    parameter.grad = torch.ones(2, 3)
    with pytest.raises(AsftError, match="keeps gradients where the constraint cannot join them"):
        add_to_gradients([parameter], torch.ones(1, 2, 3))
