"""Which model is it for: a small content fingerprint of the aligned weights, that survives 4 and 8 bits.

The fingerprint keeps, for every module, one block of 64 consecutive weights (the quantisation block of NF4 and
FP4). A loaded weight agrees when its block equals the kept one in the dtype it was loaded in; for a 4-bit or
8-bit weight, when it falls on the same codes that the kept block is quantised to. Two models that differ by a
fraction of a percent (a base and its aligned model) disagree in some of these codes, and one model loaded twice
in none, so even near relatives are told apart.
"""

import base64
import binascii
import copy
import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from axolotl_asft.errors import AsftError

BLOCK = 64
SCHEME = "block64-f32"
# One model loaded twice agrees everywhere; the allowance is for a checkpoint converted between dtypes.
MAX_MISMATCH = 0.0025


def block_start(module: str, numel: int) -> int:
    """Where the kept block of `module` starts in its flattened weight: a multiple of 64 chosen by the name."""
    blocks = max(1, numel // BLOCK)
    digest = hashlib.sha256(module.encode("utf-8")).digest()
    return BLOCK * (int.from_bytes(digest[:8], "big") % blocks)


def encode_block(module: str, weight: Tensor, added: tuple[Tensor, Tensor] | None = None) -> str:
    """The kept block of a weight (out, in), as base64 of little-endian fp32.

    Args:
        weight: (out, in).
        added: A (r, in) and scaling B (out, r) whose product is added to the weight, as a merge does.
    """
    start = block_start(module, weight.numel())
    block = _flat_block(weight, start).float().cpu()
    if added is not None:
        block = block + block_of_product(module, *added, count=len(block))
    return base64.b64encode(block.numpy().astype("<f4").tobytes()).decode("ascii")


def _flat_block(weight: Tensor, start: int) -> Tensor:
    """`BLOCK` values of the flattened weight from `start`; a transposed one is not copied for that."""
    columns = weight.shape[1]
    first, last = start // columns, -(-(start + BLOCK) // columns)
    return weight[first:last].reshape(-1)[start - first * columns :][:BLOCK]


def decode_block(text: str) -> Tensor:
    """The (<= 64,) fp32 block that `encode_block` wrote.

    Raises:
        AsftError: it is no base64 of fp32 numbers.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise AsftError(f"the direction's fingerprint is not base64 ({error}); make the file again") from error
    if len(raw) % 4 or not 0 < len(raw) <= 4 * BLOCK:
        raise AsftError(
            f"the direction's fingerprint has a block of {len(raw)} bytes; expected 4 to {4 * BLOCK}; make it again"
        )
    return torch.from_numpy(np.frombuffer(raw, dtype="<f4").copy())


def with_scales(weight: Tensor, layer: nn.Module) -> Tensor:
    """The layer's 8-bit weight with the scales of its rows, which its first forward pass moves to the layer's state."""
    scales = getattr(getattr(layer, "state", None), "SCB", None)
    if scales is None or weight.dtype != torch.int8 or getattr(weight, "SCB", None) is not None:
        return weight
    from bitsandbytes.nn import Int8Params

    return Int8Params(weight.data, requires_grad=False, SCB=scales)


def mismatches(
    module: str, block: Tensor, weight: Tensor, taken_out: tuple[Tensor, Tensor] | None = None
) -> int | None:
    """How many of the block's weights differ in `weight`: a plain or bitsandbytes weight of the loaded model.

    None where they cannot be compared: integers without the scales of their rows, floating point of 8 bits, and what
    other libraries keep in tensors of their own (torchao).

    Args:
        block: the kept (<= 64,) weights.
        weight: (out, in) as loaded.
        taken_out: A (r, in) and scaling B (out, r) whose product was subtracted from the weight (PiSSA and its like).
    """
    quant_state = getattr(weight, "quant_state", None)
    if type(weight).__module__.partition(".")[0] not in ("torch", "bitsandbytes"):
        return None
    if weight.is_floating_point() and weight.element_size() == 1:
        return None
    if taken_out is not None:
        block = block - block_of_product(module, *taken_out, count=len(block))
        if quant_state is None and weight.is_floating_point():
            start = block_start(module, weight.numel())
            loaded = weight.detach().reshape(-1)[start : start + BLOCK].float().cpu()
            # the subtraction was rounded, so that equality is too much to ask
            tolerance = max(1e-4, 2 * torch.finfo(weight.dtype).eps)
            return _mismatches_within(block, loaded, tolerance) if len(loaded) == len(block) else len(block)
    if quant_state is not None:
        return _mismatches_4bit(module, block, weight, quant_state)
    if getattr(weight, "SCB", None) is not None or not weight.is_floating_point():
        return _mismatches_int8(module, block, weight, rounded_before=taken_out is not None)
    start = block_start(module, weight.numel())
    return mismatching_values(block, weight.detach().reshape(-1)[start : start + BLOCK].cpu())


def mismatching_values(block: Tensor, loaded: Tensor) -> int:
    """How many weights of the kept block differ from the loaded ones, after rounding to their dtype."""
    if len(loaded) != len(block):
        return len(block)
    # fp32 to a few units in the last place: the sum of a merged adapter is not rounded alike everywhere
    within = 1e-6 if loaded.dtype == torch.float32 else 0.0
    differing = []
    for step in {loaded.dtype, torch.bfloat16, torch.float16}:  # it may have been loaded by way of a half type
        expected = block.to(step).to(loaded.dtype)
        differing.append(_farther(expected, loaded, within * expected.abs()))
    return min(differing)


def _mismatches_4bit(module: str, block: Tensor, weight: Tensor, quant_state) -> int:
    from bitsandbytes import functional
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    numel = quant_state.shape.numel()
    start = block_start(module, numel)
    data = weight.data
    if getattr(quant_state, "packing_format_for_cpu", False):
        # a model that has answered on a CPU with bf16 instructions keeps its weights in another order
        data, quant_state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(quant_state))
    data = data.to(quant_state.absmax.device)  # layer_offloading keeps the weights elsewhere
    loaded = dequantize_4bit(data, quant_state).reshape(-1)[start : start + BLOCK].float().cpu()
    if len(loaded) != len(block):
        return len(block)
    if quant_state.blocksize != BLOCK:
        # the scale of a larger block is not known from 64 of its weights
        return _mismatches_within(block, loaded, tolerance=0.35)
    packed, state = quantize_4bit(
        block.to(quant_state.dtype), blocksize=BLOCK, quant_type=quant_state.quant_type, compress_statistics=False
    )
    expected = dequantize_4bit(packed, state).float()
    # Codes are compared, not values: nested quantisation changes the scale of a block a little.
    return _farther(_unit(loaded), _unit(expected), 0.02)


def _mismatches_int8(module: str, block: Tensor, weight: Tensor, rounded_before: bool) -> int | None:
    """Codes are compared: round(127 w / SCB[row]), with SCB the largest weight of the row."""
    if (scales := getattr(weight, "SCB", None)) is None:
        return None
    codes = weight.data
    start = block_start(module, codes.numel())
    positions = torch.arange(start, min(start + BLOCK, codes.numel()), device=codes.device)
    if len(positions) != len(block):
        return len(block)
    rows = torch.div(positions, codes.shape[1], rounding_mode="floor")
    loaded, steps = codes.reshape(-1)[positions].float().cpu(), 127 / scales[rows.to(scales.device)].float().cpu()
    # Half a step, and a hair for ties. What was taken out was taken out of a rounded weight.
    within = 1.5 if rounded_before else 0.501
    # bitsandbytes quantises from fp16; the weight may have been loaded by way of bf16
    expected = [block.to(dtype).half().float() * steps for dtype in (torch.float16, torch.bfloat16)]
    # of a row of zeros every code is 0: its steps are infinite
    return min(_farther(torch.where(block == 0, 0.0, values), loaded, within) for values in expected)


def _mismatches_within(block: Tensor, loaded: Tensor, tolerance: float) -> int:
    return _farther(block, loaded, tolerance * block.abs().max())


def _farther(expected: Tensor, loaded: Tensor, within: Tensor | float) -> int:
    """How many are; NaN is."""
    return int((~((expected - loaded).abs() <= within)).sum())


def block_of_product(module: str, A: Tensor, B: Tensor, count: int) -> Tensor:
    """`count` values of the kept block of the product B A, A (r, in) and B (out, r), without forming the product."""
    start = block_start(module, B.shape[0] * A.shape[1])
    positions = torch.arange(start, start + count, device=A.device)
    rows, columns = torch.div(positions, A.shape[1], rounding_mode="floor"), positions % A.shape[1]
    return (B[rows].float() * A[:, columns].T.float()).sum(dim=1).cpu()


def _unit(values: Tensor) -> Tensor:
    return values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
