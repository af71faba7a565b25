"""bitsandbytes' 4-bit weights on a CPU with AVX512-BF16: repacked by the first answer in eval mode, and without a
gradient from then on, or with a wrong one."""

from typing import Any

from torch import nn

from axolotl_asft.errors import AsftError


def never_packed(model: nn.Module) -> None:
    """Keep the model's 4-bit layers as they were loaded, whatever is asked of them in between.

    bitsandbytes asks each layer whether its CPU can use the other order: from here on they say no.

    Raises:
        AsftError: a layer was repacked already.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise AsftError(
                f"{name} has run in eval mode on this CPU, for which bitsandbytes repacked its 4-bit weights: "
                "gradients through them would be wrong; load the model again, and attach the constraint first"
            )
        layer.support_avx512bf16_for_cpu = False
