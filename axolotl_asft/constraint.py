"""The trainer side: the penalty in the gradient, its numbers in the log, its mark on what is saved."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from axolotl_asft.adapter import AlignmentPenalty
from axolotl_asft.anchored import TrainerAnchor
from axolotl_asft.diagnostics import DriftReport
from axolotl_asft.engines import engine, refuse_switching, steps_past
from axolotl_asft.errors import AsftError
from axolotl_asft.history import HistoryWriter
from axolotl_asft.resuming import last_checkpoint, mark_checkpoint, peak_before, refuse_resumed
from axolotl_asft.settings import settings_of
from axolotl_asft.step_gradient import StepGradient
from axolotl_asft.strengths import Strengths
from axolotl_asft.trained import Trained

LOG = logging.getLogger("axolotl.asft")

ROUNDED = 1.01  # fp32 weights that were shortened to their budget end within this much of it


class Constraint:
    """L = L_task + lambda_reg P + anchor_weight KL inside a trainer; made by `attach`.

    The gradients join once per optimizer step (`axolotl_asft.step_gradient`), so that neither the trainer's way to its
    loss nor gradient accumulation, the number of devices, recomputation or the precision of the forward pass has any
    say in them.

    Attributes:
        penalty: the `AlignmentPenalty` over the trainer's model.
        lambda_reg: its weight. At 0 the training is left alone and the numbers are logged.
        max_drift: the budget that every layer is brought back to after each optimizer step; None: no budget.
        anchor_weight: of the divergence from the aligned model's own answers; 0: they are not asked for.
        prompt_formats: in which they are asked for, beside the chat template.
        general_formats: whether they are asked for under general system prompts and in later turns too.
        history: what the main process writes beside the adapter at each log line.
    """

    def __init__(
        self,
        trainer: Trainer,
        penalty: AlignmentPenalty,
        lambda_reg: float,
        max_drift: float | None = None,
        anchor_weight: float = 0.0,
        prompt_formats: Sequence[str] = (),
        general_formats: Sequence[str] = (),
    ):
        self.trainer = trainer
        self.penalty = penalty
        self.lambda_reg = lambda_reg
        self.max_drift = max_drift
        self.anchor_weight = anchor_weight
        self.prompt_formats = tuple(prompt_formats) if anchor_weight > 0 else ()
        self.general_formats = bool(general_formats) and anchor_weight > 0
        self._anchor = None
        if anchor_weight > 0:
            self._anchor = TrainerAnchor(trainer, penalty.direction.spec, self.prompt_formats, general_formats)
        self.gradient = StepGradient(trainer, penalty, lambda_reg, self._anchor, anchor_weight)
        self.history = HistoryWriter([layer.name for layer in penalty.layers])
        self._shortened = self._first_step = 0
        self._is_trained = False  # training has begun, so that what is saved was trained under this
        self._final_stamp: dict[str, Any] | None = None
        self._training_step = trainer.training_step
        self._log = trainer.log
        self._save_model = trainer.save_model
        self._load_optimizer = trainer._load_optimizer_and_scheduler
        self._resumed_from: Path | None = None
        self._written: set[Path] = set()  # folders that hold weights of this training
        self._create_model_card = getattr(trainer, "create_model_card", None)
        trainer.training_step = self.training_step  # type: ignore[method-assign]
        trainer.log = self.log  # type: ignore[method-assign]
        trainer.save_model = self.save_model  # type: ignore[method-assign]
        trainer._load_optimizer_and_scheduler = self.load_optimizer  # type: ignore
        if self._create_model_card is not None:
            trainer.create_model_card = self.create_model_card  # type: ignore[method-assign]
        trainer.add_callback(_EveryStepConstrained(self))

    @property
    def holds_answers(self) -> bool:
        """Whether what the aligned model said to prompts is held, so that their chat template matters."""
        return Strengths(self.lambda_reg, self.max_drift, self.anchor_weight).holds_answers(self.penalty.metric)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own; with the last micro-batch of an optimizer step, the constraint's gradients."""
        self.gradient.before_backward()
        loss = self._training_step(*args, **kwargs)
        self.gradient.after_backward()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds asft/penalty, asft/drift and the like to every training line, the peak to the last."""
        last = "train_loss" in logs
        report = self.report() if "loss" in logs or last else None  # every process takes part
        if report is not None:
            logs.update(self._metrics(report))
            if self._anchor is not None:
                logs["asft/anchor_kl"] = _significant(self._anchor.logged())
        if last:
            logs["asft/penalty_peak"] = self.penalty_peak()
        self._log(logs, *args, **kwargs)
        if report is not None or "eval_loss" in logs:
            self.history.add(self.trainer.state.global_step, self.trainer.state.epoch, logs, report, last)

    def _metrics(self, report: DriftReport) -> dict[str, float]:
        return {
            "asft/penalty": _significant(self.lambda_reg * report.penalty),
            "asft/drift": _significant(report.drift),
            "asft/update_norm": _significant(report.update_norm),
            "asft/max_drift": _significant(report.max_drift),
        }

    def report(self) -> DriftReport:
        """The drift of every layer now."""
        return DriftReport(tuple(self.penalty.measure()))

    def penalty_peak(self) -> float:
        """The largest lambda_reg P so far, before a stop too: it peaks early in training and is small at the end."""
        return _significant(float(self.gradient.peak)) if self.gradient.peak is not None else 0.0

    def settings(self) -> dict[str, Any]:
        """The constraint in plain values."""
        weights = self.lambda_reg, self.max_drift, self.anchor_weight
        return settings_of(self.penalty, *weights, self.prompt_formats, self.general_formats)

    def stamp(self, report: DriftReport | None = None) -> dict[str, Any]:
        """What a saved adapter says of the constraint that it was trained under.

        Args:
            report: of the weights now; default: measured here.
        """
        report = report or self.report()
        anchored = {"anchor_kl": _significant(self._anchor.kl)} if self._anchor is not None else {}
        return self.settings() | {
            **anchored,
            "penalty_peak": self.penalty_peak(),
            "drift": _significant(report.drift),
            "update_norm": _significant(report.update_norm),
        }

    def load_optimizer(self, checkpoint: str | None) -> None:
        """The trainer's own, remembered: what it goes on from has to be of this constraint (`begin`)."""
        self._resumed_from = None if checkpoint is None else Path(checkpoint)
        self._load_optimizer(checkpoint)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, and the stamp on what it wrote: final adapters and checkpoints alike."""
        self._save_model(output_dir, *args, **kwargs)
        folder = output_dir or self.trainer.args.output_dir
        if self._is_trained and folder is not None:
            self._written.add(Path(folder).resolve())
            self.mark(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, and the constraint's section in it: beside weights of this training, no earlier ones."""
        assert self._create_model_card is not None
        self._create_model_card(*args, **kwargs)
        folder = self.trainer.args.output_dir
        if folder is not None and Path(folder).resolve() in self._written:
            self.mark(folder)

    def mark(self, folder: str | Path | None) -> None:
        """Stamp the adapter and the model card in `folder`, on the main process."""
        self._with(self._final_stamp or self.stamp()).mark(folder)  # every process measures its sharded weights

    def before_interruption(self) -> None:
        """Somebody is about to save the adapter between any two lines of a step: back to the budget first."""
        if self.max_drift is not None and self.trainer.args.world_size == 1:
            self.penalty.shorten(self.max_drift)

    def mark_interrupted(self) -> None:
        """Stamp what was saved before the training's end; nothing is measured, since other processes may be gone."""
        state = self.trainer.state
        interrupted = self.settings() | {"interrupted_at": [state.global_step, state.max_steps]}
        self._with(self._final_stamp or interrupted).mark_interrupted()

    def trained(self) -> Trained:
        """What is left when the training has ended.

        Raises:
            AsftError: it has not, for all that the trainer said.
        """
        if self._final_stamp is None:
            raise AsftError(
                f"{type(self.trainer).__name__} does not call the callbacks of a transformers trainer, so the "
                "constraint did not see its steps; do not use this adapter"
            )
        return self._with(self._final_stamp)

    def _with(self, stamp: dict[str, Any]) -> Trained:
        is_main, kept = self.trainer.is_world_process_zero(), self.history.is_kept
        return Trained(self.penalty.direction, stamp, self.trainer.args.output_dir, is_main, kept)

    def begin(self) -> None:
        """Training starts."""
        self._shortened, self._final_stamp = 0, None
        self.gradient.begin()
        self._is_trained = True
        assert self.trainer.model is not None
        self.penalty.refuse_changed(self.trainer.model)
        self._refuse_masked_gradients()
        state, arguments = self.trainer.state, self.trainer.args
        if self.max_drift is not None:
            refuse_switching(self.trainer.optimizer)
        if state.global_step:
            checkpoint = self._resumed_from or last_checkpoint(self.trainer)
            refuse_resumed(self.trainer, checkpoint, self.settings())
            peak = peak_before(checkpoint, state.log_history)
            self.gradient.peak = None if peak is None else torch.tensor(peak)
        self._first_step = state.global_step
        if arguments.world_size > 1:
            self.penalty.start_alike(self.trainer.accelerator.device)
        self._say_where_it_starts()
        if self._anchor is not None:
            self._anchor.begin()
        if self.trainer.is_world_process_zero():
            header: dict[str, Any] = {"trainer": type(self.trainer).__name__, "engine": engine(self.trainer)}
            header |= {"device": _device(), "processes": arguments.world_size, "constraint": self.settings()}
            self.history.header |= header
            self.history.begin(arguments.output_dir or ".", state.global_step, state.max_steps, state.log_history)

    def check_step(self) -> None:
        """Refuse an optimizer step without the penalty's gradient."""
        if self.gradient.steps != self.trainer.state.global_step - self._first_step + 1:
            raise AsftError(steps_past(self.trainer))

    def keep_budget(self) -> None:
        """An optimizer step was taken: back to the budget where it went past."""
        if self.max_drift is not None:
            self.penalty.shorten(self.max_drift)
            self._shortened += 1

    def end(self) -> None:
        """Training ended: remember the numbers while every process and its weights are still there."""
        steps = self.trainer.state.global_step - self._first_step
        joined = self.gradient.steps
        constrained = joined if self.max_drift is None else min(joined, self._shortened)
        if constrained != steps:
            raise AsftError(f"{steps} steps were trained, {constrained} of them constrained; do not use this adapter")
        assert self.trainer.model is not None
        self.penalty.refuse_changed(self.trainer.model)
        report = self.report()
        if self.max_drift is not None and not math.isfinite(report.update_norm):
            raise AsftError("the update is no longer finite: the training diverged; do not use this adapter")
        exact = all(layer.B.dtype == torch.float32 for layer in self.penalty.layers)  # half types round far past it
        if self.max_drift is not None and exact and report.max_drift > ROUNDED * self.max_drift:
            raise AsftError(
                f"the update ended at {report.max_drift:.3g} times what alignment moved, past max_drift "
                f"{self.max_drift:g}: something changed the weights after their steps; do not use this adapter"
            )
        if self._anchor is not None:
            self._anchor.measure()
        self._final_stamp = self.stamp(report)

    def _refuse_masked_gradients(self) -> None:
        """What is added after the backward pass, or shortened after the step, would pass a hook on the gradient by."""
        if self.lambda_reg == 0 and self.max_drift is None:
            return
        for layer in self.penalty.layers:
            if layer.A._backward_hooks or layer.B._backward_hooks:
                raise AsftError(
                    f"{layer.name}: a hook changes the gradient of its LoRA factors, as a slice such as [0:8] in "
                    "unfrozen_parameters does, and the constraint would move what that keeps frozen; leave the slice "
                    "out, or set lambda_reg: 0 and no max_drift"
                )

    def _say_where_it_starts(self) -> None:
        """An adapter that was trained before brings what it learned then, under whatever."""
        # measured by every process, and not where a run goes on
        if not self.trainer.state.global_step and (norm := self.report().update_norm) > 0:
            LOG.warning(
                "AsFT: the adapter already holds an update of norm %.4g from earlier training; this run's stamp does "
                "not cover how it was made, but the constraint applies to all of it",
                norm,
            )


class _EveryStepConstrained(TrainerCallback):
    """Nothing is learned without the constraint: asked before every optimizer step, and at the end."""

    def __init__(self, constraint: Constraint):
        self._constraint = constraint

    def on_train_begin(self, args, state, control, **kwargs):
        self._constraint.begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._constraint.check_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._constraint.keep_budget()

    def on_save(self, args, state, control, **kwargs):
        constraint = self._constraint
        mark_checkpoint(constraint.trainer, constraint.settings() | {"penalty_peak": constraint.penalty_peak()})

    def on_train_end(self, args, state, control, **kwargs):
        self._constraint.end()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _significant(value: float) -> float:
    return float(f"{value:.6g}")
