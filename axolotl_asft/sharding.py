"""What engines keep in pieces on several devices: FSDP2's parameters (DTensors), ZeRO's gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from axolotl_asft.errors import AsftError


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all ranks; any other tensor as it is.

    A collective: every rank of the tensor's mesh has to call it. Differentiable.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    # parameters offloaded to the host are gathered where the mesh can talk
    gathered: DTensor = tensor.to(tensor.device_mesh.device_type)  # type: ignore[assignment]
    return gathered.full_tensor()


@torch.no_grad()
def add_to_gradients(parameters: Sequence[Tensor], gradients: Tensor) -> None:
    """parameter.grad += gradient for every one that trains, in the parameters' dtype and in their pieces.

    Args:
        parameters: n of one shape and dtype.
        gradients: (n, ...), the whole gradients, the same on every rank. No communication, but for ZeRO's.
    """
    plain = []
    for parameter, gradient in zip(parameters, gradients.to(parameters[0].dtype), strict=True):
        if not parameter.requires_grad:
            continue
        gradient = _placed(gradient, parameter)
        if hasattr(parameter, "_hp_mapping"):
            _add_to_zero(parameter, gradient)
        elif parameter.grad is None:
            parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        elif isinstance(parameter, DTensor):
            parameter.grad.add_(gradient)
        else:
            plain.append((parameter.grad, gradient))
    if plain:  # in one launch
        torch._foreach_add_(*map(list, zip(*plain, strict=True)))


def _add_to_zero(parameter: Tensor, gradient: Tensor) -> None:
    """The same where DeepSpeed's ZeRO keeps the reduced gradient, between its backward pass and its step.

    Raises:
        AsftError: the parameter still has a gradient of its own: that would be changed, and another stepped by.
    """
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    if parameter.grad is not None:
        raise AsftError(
            "this DeepSpeed config keeps gradients where the constraint cannot join them (its BF16_Optimizer); leave "
            "data_types.grad_accum_dtype out, or use ZeRO-2"
        )
    safe_set_full_grad(parameter, safe_get_full_grad(parameter) + gradient)


@torch.no_grad()
def overwrite(parameters: Sequence[Tensor], values: Tensor) -> None:
    """parameter = value for every one that trains, in the parameters' dtype and in their pieces.

    Args:
        parameters: n of one shape and dtype.
        values: (n, ...), the wholes, the same on every rank. No communication.
    """
    plain = []
    for parameter, value in zip(parameters, values.to(parameters[0].dtype), strict=True):
        if not parameter.requires_grad:
            continue
        value = _placed(value, parameter)
        if isinstance(parameter, DTensor):
            parameter.copy_(value)
        else:
            plain.append((parameter, value))
    if plain:  # in one launch
        targets, sources = map(list, zip(*plain, strict=True))
        torch._foreach_copy_(targets, sources)


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is kept: in its pieces, on its device. No communication."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)
