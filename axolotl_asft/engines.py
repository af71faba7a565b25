"""What carries the training (one device, DDP, FSDP2), and which of it the constraint can join."""

from typing import Any

from transformers import Trainer

from axolotl_asft.errors import AsftError

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")
DEEPSPEED = (
    "DeepSpeed is not supported by the constraint, because it steps inside its own backward pass; use DDP (leave "
    "deepspeed out), or FSDP2 (fsdp_version: 2) where the model does not fit on one device"
)
FSDP1 = "FSDP1 is not supported by the constraint (it is deprecated); set fsdp_version: 2"
# They take the gradient of each weight as it comes, before the whole of it is known.
STEPS_IN_BACKWARD = ("lomo", "adalomo")
# They keep the weights twice, evaluate and save one of them, and a budget would see the other alone.
KEEPS_TWO_WEIGHTS = "schedule_free"


def engine(trainer: Trainer) -> str:
    """accelerate's name for how the training is distributed: NO, MULTI_GPU, FSDP, DEEPSPEED, ..."""
    kind = trainer.accelerator.distributed_type
    return str(getattr(kind, "value", kind))


def refuse_unsupported(trainer: Trainer, max_drift: float | None = None) -> None:
    """One line for a way of training in which the constraint would not be what it promises.

    Raises:
        AsftError: it names the combination and what to use instead.
    """
    kind = engine(trainer)
    if kind == "FSDP":
        fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if getattr(fsdp, "fsdp_version", 1) != 2:
            raise AsftError(FSDP1)
    elif kind == "DEEPSPEED":
        raise AsftError(DEEPSPEED)
    elif kind not in REPLICATED:
        raise AsftError(f"training under {kind} is not supported by the constraint; use one device, DDP or FSDP2")
    _refuse_other_parallelism(trainer)
    refuse_optimizer(str(getattr(trainer.args.optim, "value", trainer.args.optim)), max_drift)


def refuse_optimizer(optimizer: str, max_drift: float | None) -> None:
    """One line for an optimizer that steps during the backward pass, or that a budget cannot hold.

    Raises:
        AsftError: it does, by its name.
    """
    name = optimizer.lower()
    if name in STEPS_IN_BACKWARD or name.endswith("layerwise"):
        raise AsftError(steps_in_backward(name))
    if max_drift is not None and name.startswith(KEEPS_TWO_WEIGHTS):
        raise AsftError(keeps_two_weights(name))


def refuse_switching(optimizer: Any) -> None:
    """One line for an optimizer that swaps the weights for evaluation, which a budget cannot hold.

    Raises:
        AsftError: it does.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the methods whatever is in it
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise AsftError(keeps_two_weights(type(inner).__name__))


def _refuse_other_parallelism(trainer: Trainer) -> None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for key, size in (("tensor_parallel_size", "tp_size"), ("context_parallel_size", "cp_size")):
        if parallel is not None and (getattr(parallel, size, 1) or 1) > 1:
            raise AsftError(other_parallelism(key))


def steps_in_backward(optimizer: str) -> str:
    """The line for an optimizer that leaves no gradient to add to."""
    return (
        f"optimizer {optimizer} steps during the backward pass, before the gradient is complete; use another "
        "optimizer, for example adamw_8bit"
    )


def keeps_two_weights(optimizer: str) -> str:
    """The line for an optimizer under which the weights that are saved are not those that are kept to a budget."""
    return (
        f"optimizer {optimizer} evaluates and saves an average of the weights, which max_drift cannot hold; use "
        "another optimizer, for example adamw_8bit, or lambda_reg in place of max_drift"
    )


def other_parallelism(key: str) -> str:
    """The line for an axis of parallelism other than the data's."""
    return f"{key} is not supported by the constraint; leave it out, and use DDP or FSDP2"
