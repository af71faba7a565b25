"""What carries the training (one device, DDP, FSDP2, DeepSpeed), and which of it the constraint can join."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer

from axolotl_asft.errors import AsftError
from axolotl_asft.files import read_json

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")
DEEPSPEED = "DEEPSPEED"  # accelerate's name for it
ZERO_STAGES = (0, 1, 2)
SUPPORTED = "one device, DDP, FSDP2, or DeepSpeed with ZeRO-1 or ZeRO-2"
FSDP1 = (
    "FSDP1 is not supported by the constraint (it is deprecated); set fsdp_version: 2, and in 4 bit "
    "fsdp_config.cpu_ram_efficient_loading: false"
)
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
    elif kind == DEEPSPEED:
        refuse_deepspeed(
            trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config,
            trainer.accelerator.mixed_precision == "fp16",
            max_drift,
        )
    elif kind not in REPLICATED:
        raise AsftError(f"training under {kind} is not supported by the constraint; use {SUPPORTED}")
    _refuse_other_parallelism(trainer)
    refuse_optimizer(str(getattr(trainer.args.optim, "value", trainer.args.optim)), max_drift)


def steps_inside(trainer: Trainer) -> bool:
    """Whether the optimizer steps inside the backward pass of the last micro-batch, as DeepSpeed's engine does."""
    return engine(trainer) == DEEPSPEED


def backward(trainer: Trainer, loss: Tensor) -> None:
    """The gradient of `loss` on top of what is there, and no step."""
    if steps_inside(trainer):
        trainer.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
    else:
        loss.backward()


def deepspeed_config(given: Any) -> Mapping[str, Any]:
    """A DeepSpeed config, given as a mapping or as the path of a JSON file.

    Raises:
        AsftError: it is neither.
    """
    if isinstance(given, Mapping):
        return given
    expected = "deepspeed: expects the path of a DeepSpeed config in JSON, or its content as a block"
    return read_json(Path(str(given)), expected)


def refuse_deepspeed(config: Mapping[str, Any], half: bool, max_drift: float | None) -> None:
    """One line for what the constraint cannot join in a run under DeepSpeed.

    Args:
        config: DeepSpeed's.
        half: whether the run asks for fp16.

    Raises:
        AsftError: it names the key and what to use instead.
    """
    zero = config.get("zero_optimization") or {}
    if (stage := zero.get("stage", 0)) not in ZERO_STAGES:
        raise AsftError(
            f"DeepSpeed's ZeRO-{stage} is not supported by the constraint, because it splits the weights before they "
            "can be compared with the direction's; use ZeRO-1 or ZeRO-2, or FSDP2 (fsdp_version: 2) where the model "
            "does not fit on one device"
        )
    if ((zero.get("offload_optimizer") or {}).get("device") or "none") != "none":
        raise AsftError(
            "DeepSpeed's offload_optimizer is not supported by the constraint, because added gradients are lost there; "
            "leave it out (the optimizer state of a LoRA adapter is small)"
        )
    if zero.get("round_robin_gradients") is True:
        raise AsftError(
            "DeepSpeed's round_robin_gradients is not supported by the constraint, because the pieces of a gradient "
            "cannot be put together there; leave it out"
        )
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    if stage == 1 and accumulated == "fp32" and (config.get("bf16") or {}).get("enabled") not in (None, False):
        raise AsftError(
            "DeepSpeed's ZeRO-1 in bf16 with data_types.grad_accum_dtype: fp32 is not supported by the constraint, "
            "because added gradients are lost there; use ZeRO-2, or leave grad_accum_dtype out"
        )
    if half or (config.get("fp16") or {}).get("enabled") is True:
        raise AsftError("fp16 under DeepSpeed is not supported by the constraint; use bf16, or leave deepspeed out")
    if max_drift is not None:
        raise AsftError(
            "max_drift is not supported under DeepSpeed, which keeps a second copy of the weights that the budget "
            "would not reach; use lambda_reg, or leave deepspeed out"
        )


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


def steps_past(trainer: Trainer) -> str:
    """The line for a training loop of its own, whose steps would be taken without the constraint."""
    return (
        f"{type(trainer).__name__} takes a step outside its training_step, so the constraint is not in the gradient; "
        "this trainer is not supported"
    )


def keeps_two_weights(optimizer: str) -> str:
    """The line for an optimizer under which the weights that are saved are not those that are kept to a budget."""
    return (
        f"optimizer {optimizer} evaluates and saves an average of the weights, which max_drift cannot hold; use "
        "another optimizer, for example adamw_8bit, or lambda_reg in place of max_drift"
    )


def other_parallelism(key: str) -> str:
    """The line for an axis of parallelism other than the data's."""
    return f"{key} is not supported by the constraint; leave it out, and use {SUPPORTED}"
