"""What a run was constrained by, in plain values: in its adapter's stamp, in its history, beside its checkpoints."""

from collections.abc import Sequence
from typing import Any

from axolotl_asft import __version__
from axolotl_asft.adapter import AlignmentPenalty


def settings_of(
    penalty: AlignmentPenalty,
    lambda_reg: float,
    max_drift: float | None,
    anchor_weight: float,
    prompt_formats: Sequence[str] = (),
    general_formats: bool = False,
) -> dict[str, Any]:
    """A constraint of these in plain values."""
    return {
        "direction": penalty.direction.spec["aligned"]["id"],
        "direction_sha256": penalty.direction.sha256,
        "lambda_reg": lambda_reg,
        "projector": penalty.projector,
        "rank": penalty.rank,
        "metric": penalty.metric,
        "max_drift": max_drift,
        "anchor_weight": anchor_weight,
        "prompt_formats": list(prompt_formats),
        "general_formats": general_formats,
        "lora_scaling": penalty.lora_scaling,
        "modules": penalty.modules,
        "on_uncovered": penalty.on_uncovered,
        "layers": len(penalty.layers),
        "uncovered": penalty.uncovered,
        "version": __version__,
    }
