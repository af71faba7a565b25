"""The trainer side: the penalty in the loss, its numbers in the log, its mark on what is saved."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from axolotl_asft import __version__
from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.diagnostics import DriftReport
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.stamp import stamp_adapter, stamp_model_card

LOG = logging.getLogger("axolotl.asft")

# Others keep A and B in pieces, or take the backward pass into their own hands.
SUPPORTED_DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU")


class Constraint:
    """L = L_task + lambda_reg P inside a trainer; made by `attach`.

    Attributes:
        penalty: the `AlignmentPenalty` over the trainer's model.
        lambda_reg: its weight. At 0 the training is left alone and the numbers are logged.
    """

    def __init__(self, trainer: Trainer, penalty: AlignmentPenalty, lambda_reg: float):
        self.trainer = trainer
        self.penalty = penalty
        self.lambda_reg = lambda_reg
        self._terms_since_step = 0
        self._peak: Tensor | None = None
        self._compute_loss = trainer.compute_loss
        self._log = trainer.log
        self._save_model = trainer.save_model
        self._create_model_card = getattr(trainer, "create_model_card", None)
        trainer.compute_loss = self.compute_loss  # type: ignore[method-assign]
        trainer.log = self.log  # type: ignore[method-assign]
        trainer.save_model = self.save_model  # type: ignore[method-assign]
        if self._create_model_card is not None:
            trainer.create_model_card = self.create_model_card  # type: ignore[method-assign]
        trainer.add_callback(_EveryStepConstrained(self))

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss in value, with the gradient of lambda_reg P added to it."""
        result = self._compute_loss(model, inputs, *args, **kwargs)
        if not model.training or not torch.is_grad_enabled():
            return result
        self._terms_since_step += 1
        if self.lambda_reg == 0:
            return result
        num_items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        term = self.lambda_reg * self.penalty()
        self._peak = term.detach() if self._peak is None else torch.maximum(self._peak, term.detach())
        term = term * self._share_of_step(num_items)
        if isinstance(result, tuple):
            return (_with_gradient_of(result[0], term), *result[1:])
        return _with_gradient_of(result, term)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds asft/penalty, asft/drift and asft/update_norm to every training line, the peak to the last."""
        if "loss" in logs:
            logs.update(self.metrics())
        elif "train_loss" in logs:
            logs.update({**self.metrics(), "asft/penalty_peak": self.penalty_peak()})
        self._log(logs, *args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """The logged numbers, of the weights as they are now."""
        report = self.report()
        with torch.no_grad():
            penalty = self.lambda_reg * float(self.penalty())
        return {
            "asft/penalty": _significant(penalty),
            "asft/drift": _significant(report.drift),
            "asft/update_norm": _significant(report.update_norm),
        }

    def report(self) -> DriftReport:
        """The drift of every layer now."""
        return DriftReport(tuple(self.penalty.measure()))

    def penalty_peak(self) -> float:
        """The largest lambda_reg P so far: it peaks early in training and is small at the end."""
        return _significant(float(self._peak)) if self._peak is not None else 0.0

    def stamp(self) -> dict[str, Any]:
        """What a saved adapter says of the constraint that it was trained under."""
        report = self.report()
        direction = self.penalty.direction
        return {
            "direction": direction.spec["aligned"]["id"],
            "direction_sha256": direction.sha256,
            "lambda_reg": self.lambda_reg,
            "projector": self.penalty.projector,
            "rank": self.penalty.rank,
            "lora_scaling": self.penalty.lora_scaling,
            "modules": self.penalty.modules,
            "on_uncovered": self.penalty.on_uncovered,
            "layers": len(self.penalty.layers),
            "penalty_peak": self.penalty_peak(),
            "drift": _significant(report.drift),
            "update_norm": _significant(report.update_norm),
            "version": __version__,
        }

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, and the stamp on what it wrote: final adapters and checkpoints alike."""
        self._save_model(output_dir, *args, **kwargs)
        self.mark(output_dir or self.trainer.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, and the constraint's section in it."""
        assert self._create_model_card is not None
        self._create_model_card(*args, **kwargs)
        self.mark(self.trainer.args.output_dir)

    def mark(self, folder: str | Path | None) -> None:
        """Stamp the adapter and the model card in `folder`, on the main process."""
        if folder is None or not self.trainer.is_world_process_zero():
            return
        stamp = self.stamp()
        stamp_adapter(folder, stamp)
        stamp_model_card(folder, stamp)

    def check_step(self) -> None:
        """Refuse an optimizer step whose loss never passed through `compute_loss`."""
        if self._terms_since_step == 0:
            raise AsftError(
                f"{type(self.trainer).__name__} took a step without its compute_loss, so the constraint was not in the "
                "loss; this trainer is not supported"
            )
        self._terms_since_step = 0

    def _share_of_step(self, num_items: Any) -> float:
        """The factor that makes one optimizer step count P once, whatever the gradient accumulation.

        The trainer divides what `compute_loss` returns by the number of accumulated micro-batches, unless the
        loss is already normalised by the items of all of them.
        """
        trainer = self.trainer
        divides = not getattr(trainer, "model_accepts_loss_kwargs", False) or num_items is None
        if divides and getattr(trainer, "compute_loss_func", None) is None:
            return 1.0
        steps = getattr(trainer, "current_gradient_accumulation_steps", None)
        return 1.0 / (steps or trainer.args.gradient_accumulation_steps)


class _EveryStepConstrained(TrainerCallback):
    """Nothing is learned without the constraint: asked before every optimizer step."""

    def __init__(self, constraint: Constraint):
        self._constraint = constraint

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._constraint.check_step()


def attach(trainer: Trainer, direction: AlignmentDirection, lambda_reg: float = 1.0, **options: Any) -> Constraint:
    """Train with L = L_task + lambda_reg P from the first step to the last (AsFT, arXiv 2506.08473).

    Args:
        trainer: a transformers or TRL trainer over a PEFT model.
        direction: the alignment direction of the trainer's model.
        lambda_reg: weight of the penalty, finite and not negative; 0 leaves the training as it is.
        options: as for `AlignmentPenalty`: projector, rank, lora_scaling, modules, on_uncovered, verify_model.

    The logged loss stays the task's. The penalty counts once per optimizer step, whatever the gradient
    accumulation. Evaluation is left alone.

    Raises:
        AsftError: an unsuitable lambda_reg, model, direction or way of training; a second `attach`.
    """
    if isinstance(lambda_reg, bool) or not math.isfinite(lambda_reg) or lambda_reg < 0:
        raise AsftError(f"lambda_reg is {lambda_reg}; expected a finite number, 0 or more")
    attached: Callable[..., Any] = trainer.compute_loss
    if isinstance(getattr(attached, "__self__", None), Constraint):
        raise AsftError("the constraint is attached to this trainer already; attach it once")
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    if kind not in SUPPORTED_DISTRIBUTED:
        raise AsftError(f"training under {kind} is not supported by the constraint yet; use one device or DDP")
    if trainer.model is None:
        raise AsftError("the trainer has no model; expected a PEFT model")
    penalty = AlignmentPenalty(trainer.model, direction, **options)
    constraint = Constraint(trainer, penalty, float(lambda_reg))
    LOG.info(
        "AsFT: %d layers constrained, lambda_reg %g, projector %s, direction of %s (sha256 %s)",
        len(penalty.layers),
        lambda_reg,
        penalty.projector,
        direction.spec["aligned"]["id"],
        (direction.sha256 or "unsaved")[:12],
    )
    return constraint


def _with_gradient_of(loss: Tensor, term: Tensor) -> Tensor:
    """The loss in value, loss + term in gradient."""
    return loss + (term - term.detach()).to(loss.device, loss.dtype)


def _significant(value: float) -> float:
    return float(f"{value:.6g}")
