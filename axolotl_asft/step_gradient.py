"""Where the constraint's gradient joins the task's: once per optimizer step, whatever carries the training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.anchored import TrainerAnchor
from axolotl_asft.engines import steps_in_backward, steps_inside, steps_past
from axolotl_asft.errors import AsftError


class StepGradient:
    """The gradient of lambda_reg P + anchor_weight KL, once per optimizer step.

    It is added to the finished gradient of the task: after the last micro-batch and the sum over devices, before
    clipping; that of P in closed form, that of the anchor by one more micro-batch before it. DeepSpeed takes its step
    inside the backward pass of the last micro-batch: there the anchor goes ahead of that, and P comes right before the
    engine's step.

    Attributes:
        lambda_reg, anchor: 0 and None leave P and the anchor out of the steps that come.
        steps: how many optimizer steps it has joined since `begin`.
        peak: the largest lambda_reg P of these; None before the first.
    """

    def __init__(
        self,
        trainer: Trainer,
        penalty: AlignmentPenalty,
        lambda_reg: float,
        anchor: TrainerAnchor | None,
        anchor_weight: float,
    ):
        self.lambda_reg = lambda_reg
        self.anchor = anchor
        self.steps = 0
        self.peak: Tensor | None = None
        self._trainer = trainer
        self._penalty = penalty
        self._anchor_weight = anchor_weight
        self._is_inside = steps_inside(trainer)
        self._engine: Any = None  # DeepSpeed's, whose step this comes before
        self._announced = False  # that engine's next step, by the trainer's last micro-batch

    def begin(self) -> None:
        """Training starts; where DeepSpeed carries it, its engine is there now."""
        self.steps, self.peak = 0, None
        if self._is_inside and self._engine is not self._trainer.model_wrapped:
            self._engine = self._trainer.model_wrapped
            self._engine.step = self._before(self._engine.step)

    def before_backward(self) -> None:
        """A micro-batch comes."""
        if self._is_inside and self._is_last():
            self._add_anchor()
            self._announced = True

    def after_backward(self) -> None:
        """A micro-batch is done."""
        if not self._is_inside and self._is_last():
            self.steps += 1
            if self.steps == 1 and (self.lambda_reg > 0 or self.anchor is not None):
                self._refuse_spent_gradients()
            self._add_anchor()
            self._add_penalty()

    def _before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed's step, with the penalty in the gradient that it steps by."""

        def constrained(*args: Any, **kwargs: Any) -> Any:
            if self._engine.is_gradient_accumulation_boundary():
                if not self._announced:
                    raise AsftError(steps_past(self._trainer))
                self._announced = False
                self.steps += 1
                self._add_penalty()
            return step(*args, **kwargs)

        return constrained

    def _is_last(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return bool(self._trainer.accelerator.sync_gradients)

    def _add_anchor(self) -> None:
        if self.anchor is not None:
            self.anchor.add_gradient(self._scaled(self._anchor_weight))

    def _add_penalty(self) -> None:
        if self.lambda_reg > 0:
            value = self.lambda_reg * self._penalty.add_gradient(self._scaled(self.lambda_reg))
            self.peak = value if self.peak is None else torch.maximum(self.peak.to(value), value)

    def _scaled(self, weight: float) -> Tensor | float:
        """A weight, in fp16 times the loss scale, by which the gradients are still multiplied here."""
        scaler = self._trainer.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return weight
        device = self._penalty.layers[0].A.device
        return scaler.scale(torch.tensor(weight, device=device))

    def _refuse_spent_gradients(self) -> None:
        """An optimizer that steps during the backward pass leaves no gradient to add to."""
        for layer in self._penalty.layers:
            for factor in (layer.A, layer.B):
                if getattr(factor, "_post_accumulate_grad_hooks", None):
                    raise AsftError(steps_in_backward(self._trainer.args.optim))
