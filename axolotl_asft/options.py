"""Which options of the constraint go together: what a run and its dry run both have to know."""

from typing import Any

from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.errors import AsftError

# What a metric leaves out is where a decoupled penalty would let everything go (docs/findings.md).
DECOUPLED_DAMPING = 0.01


def with_damping(options: dict[str, Any], decoupled: bool) -> dict[str, Any]:
    """The options of `AlignmentPenalty` with their damping filled in."""
    damping = options.get("damping")
    return options | {"damping": (DECOUPLED_DAMPING if decoupled else 0.0) if damping is None else damping}


def refuse_decoupled(penalty: AlignmentPenalty) -> None:
    """Refuse what a proximal step is not worked out for."""
    if taken := [layer.name for layer in penalty.layers if layer.was_taken_out]:
        raise AsftError(
            f"decoupled cannot hold {taken[0]}: its initialisation took a part out of the weight; use decoupled: "
            "false, or plain LoRA initialisation"
        )
    if penalty.metric != "weights" and penalty.rank:
        raise AsftError(
            f"decoupled with metric {penalty.metric} and rank {penalty.rank} is not worked out; leave rank out, so "
            "that no direction is free"
        )


def budget_refused(layer: str) -> str:
    """The line for a budget over a layer whose initialisation took a part out of the weight."""
    return (
        f"max_drift cannot shorten the update of {layer}: its initialisation took a part out of the weight; use "
        "lambda_reg, or plain LoRA initialisation"
    )
