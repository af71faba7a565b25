"""How strongly a run is held where its settings leave that open."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALONE = 1.0  # lambda_reg
# What benchmarks/results/safety.md speaks for, on both its tasks, under the metric fisher.
ANCHORED_LAMBDA, ANCHOR_WEIGHT = 0.1, 3.0
# What is said where nothing but the change of the weights is held.
WEIGHTS_ALONE = (
    "a penalty on the weights alone kept little of the safety in our benchmarks; make the direction with `axolotl asft "
    "extract --metric fisher`: that metric, with an anchor, then becomes the default"
)


@dataclass(frozen=True)
class Strengths:
    """lambda_reg, max_drift and anchor_weight of a run, nothing left open but that there is no budget."""

    lambda_reg: float
    max_drift: float | None
    anchor_weight: float

    def holds_weights_alone(self, metric: str | None) -> bool:
        """Whether a penalty on the change of the weights is all there is; `WEIGHTS_ALONE` says what it is worth."""
        return metric == "weights" and self.lambda_reg > 0 and self.max_drift is None and self.anchor_weight == 0

    def holds_answers(self, metric: str | None) -> bool:
        """Whether what the aligned model said to prompts is held, so that their chat template matters."""
        return metric != "weights" or self.anchor_weight > 0


def strengths(
    metric: str | None,
    spec: Mapping[str, Any],
    lambda_reg: float | None = None,
    max_drift: float | None = None,
    anchor_weight: float | None = None,
    *,
    taken_out: bool,
) -> Strengths:
    """lambda_reg, max_drift and anchor_weight: what is given stays, the rest is chosen by what was measured.

    `metric` is the one that the penalty is measured in, `spec` the direction's.

    - anchor_weight is 3 where the metric is fisher, the direction file holds the aligned model's own answers, there is
      no max_drift, and no initialisation has `taken_out` a part of the weights, so that the model without its adapter
      is the aligned one; else 0. A lambda_reg leaves it where it is: who turns one knob keeps the other.
    - lambda_reg is 0 beside a max_drift, 0.1 beside an anchor under the metric fisher, else 1.
    """
    fisher = metric == "fisher"
    if anchor_weight is None:
        is_measured = fisher and bool(spec.get("own_answers")) and max_drift is None and not taken_out
        anchor_weight = ANCHOR_WEIGHT if is_measured else 0.0
    if lambda_reg is None:
        lambda_reg = 0.0 if max_drift is not None else ANCHORED_LAMBDA if fisher and anchor_weight > 0 else ALONE
    return Strengths(float(lambda_reg), max_drift, float(anchor_weight))
