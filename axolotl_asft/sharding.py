"""Parameters that are kept in pieces on several devices (FSDP2's DTensors), one at a time as a whole."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
def add_to_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """parameter.grad += gradient, in the parameter's dtype and in its pieces.

    Args:
        gradient: the whole gradient, the same on every rank. No communication.
    """
    gradient = gradient.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        pieces = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
        gradient = pieces.to(parameter.device)
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.device).contiguous()
    else:
        parameter.grad.add_(gradient)


@torch.no_grad()
def overwrite(parameter: Tensor, value: Tensor) -> None:
    """parameter = value, in the parameter's dtype and in its pieces.

    Args:
        value: the whole, the same on every rank. No communication.
    """
    value = value.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value.to(parameter.device))
