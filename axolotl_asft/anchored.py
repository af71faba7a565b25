"""The anchor inside a trainer: asked at every optimizer step, its gauge in the log, measured when training ends."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from axolotl_asft.anchor import AnswerAnchor, own_answers_of
from axolotl_asft.engines import backward
from axolotl_asft.quiet import without_noise

LOG = logging.getLogger("axolotl.asft")
RECOGNISED = 0.75  # of its own greedy answers a model says 94 % again in another precision, its base half


class TrainerAnchor:
    """The gradient of anchor_weight KL(aligned || now) in a trainer's steps.

    Attributes:
        kl: KL of the aligned model's own answers, nats a token: the mean over the steps up to the last line of the log;
            after `measure`, of all answers, of the weights as they are. Later turns that are to be answered as the
            first is have no part in it. The same on every process.
    """

    def __init__(self, trainer: Trainer, spec: Any, formats: Sequence[str] = (), general: Sequence[str] = ()):
        """
        Args:
            spec: of the direction file, which keeps the answers.
            formats: in which they are asked for too (`axolotl_asft.prompt_formats`).
            general: in which they are asked for besides (`axolotl_asft.general_formats`).

        Raises:
            AsftError: it keeps none, or the trainer has no tokenizer that can read them.
        """
        self.kl = 0.0
        self._trainer = trainer
        self._answers = AnswerAnchor(getattr(trainer, "processing_class", None), own_answers_of(spec), formats, general)
        self._divergences: list[Tensor] = []  # since the last line of the log

    def begin(self) -> None:
        """Training starts: remember what the aligned model says. Every process has to call."""
        self._divergences.clear()
        with self._trainer.compute_loss_context_manager():
            recognised = self._answers.remember(self._model())
        if recognised < RECOGNISED:
            LOG.warning(
                "AsFT: without its adapter the model reproduces only %.0f %% of the stored answer tokens; its "
                "tokenizer, embeddings or head may not be the aligned model's; the anchor holds what this model "
                "answers",
                100 * recognised,
            )

    def add_gradient(self, weight: Tensor | float) -> None:
        """One more backward pass, through the model as the trainer wrapped it."""
        arguments, model = self._trainer.args, self._trainer.model_wrapped
        step, rank, world = self._trainer.state.global_step, arguments.process_index, arguments.world_size
        with without_noise(model), self._offload():
            with self._trainer.compute_loss_context_manager():
                loss = self._answers.loss(model, step, rank, world)
            backward(self._trainer, loss * (weight.to(loss.device) if isinstance(weight, Tensor) else weight))
        self._divergences.append(self._answers.kl)

    def logged(self) -> float:
        """`kl`, of the steps since the last line of the log. Every process has to call."""
        if self._divergences:
            mean = torch.stack(self._divergences).mean()
            self.kl = float(self._trainer.accelerator.reduce(mean, "mean"))
            self._divergences.clear()
        return self.kl

    def measure(self) -> None:
        """Training ended: `kl` of the weights that are saved. Every process has to call."""
        with self._trainer.compute_loss_context_manager():
            self.kl = float(self._answers.measure(self._model()))

    def _model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)

    def _offload(self) -> AbstractContextManager[Any]:
        """Where the trainer keeps activations off the device, so does the anchor: axolotl's name for it, and TRL's."""
        for name in ("activation_offload_context", "maybe_activation_offload_context"):
            if hasattr(self._trainer, name):
                return getattr(self._trainer, name)
        return nullcontext()
