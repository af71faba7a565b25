"""One model is recognised however it is loaded; a near relative is not."""

import pytest
import torch

from axolotl_asft.errors import AsftError
from axolotl_asft.fingerprint import BLOCK, MAX_MISMATCH, block_start, decode_block, encode_block, mismatches

NAMES = [f"model.layers.{i}.mlp.up_proj" for i in range(60)]
RELATIVE = 0.004  # ||d|| / ||W|| of a real base and its aligned model


def weight(seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (0.02 * torch.randn(128, 256, generator=torch.Generator().manual_seed(seed))).to(dtype)


def relative_of(other: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    return (other.float() + RELATIVE * 0.02 * noise).to(other.dtype)


def in_4bit(values: torch.Tensor, nested: bool, kind: str = "nf4") -> torch.Tensor:
    from bitsandbytes.nn import Params4bit

    return Params4bit(values.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested).to("cpu")


def in_8bit(values: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.nn import Int8Params

    return Int8Params(values.half().clone(), requires_grad=False, has_fp16_weights=False).to("cpu")


def share(made_from: torch.Tensor, loaded: torch.Tensor) -> float:
    """Share of differing weights over the blocks of many names."""
    return sum(mismatches(n, decode_block(encode_block(n, made_from)), loaded) for n in NAMES) / (BLOCK * len(NAMES))


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_full_precision(stored, loaded):
    values = weight(dtype=stored)
    assert share(values, values.to(loaded)) <= MAX_MISMATCH
    assert share(relative_of(values), values.to(loaded)) > 10 * MAX_MISMATCH


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit(nested, kind, dtype):
    values = weight(dtype=dtype)
    loaded = in_4bit(values, nested, kind)
    assert share(values, loaded) == 0
    assert share(relative_of(values), loaded) > 2 * MAX_MISMATCH
    assert share(weight(seed=5), loaded) > 0.5


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_in_the_order_of_a_cpu_that_has_answered(nested):
    """On a CPU with bf16 instructions bitsandbytes reorders the weights at the first forward pass in eval mode."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    loaded = in_4bit(weight(), nested)
    loaded.data, loaded.quant_state = _convert_weight_packed_for_cpu(loaded.data, loaded.quant_state)
    kept = loaded.data.clone()
    assert share(weight(), loaded) == 0
    assert share(relative_of(weight()), loaded) > 2 * MAX_MISMATCH
    assert loaded.quant_state.packing_format_for_cpu, "looking changes nothing"
    assert torch.equal(loaded.data, kept)


def test_8bit():
    """Rounding to 8 bit hides a near relative; a stranger is seen."""
    assert share(weight(), in_8bit(weight())) == 0
    assert share(weight(seed=5), in_8bit(weight())) > 0.5


def test_blocks_are_whole_quantisation_blocks():
    for name in NAMES:
        start = block_start(name, 128 * 256)
        assert start % BLOCK == 0
        assert 0 <= start <= 128 * 256 - BLOCK
    assert len({block_start(name, 128 * 256) for name in NAMES}) > 40


def test_small_and_reshaped_weights():
    small = torch.randn(3, 5)
    block = decode_block(encode_block("small", small))
    assert len(block) == 15
    assert mismatches("small", block, small) == 0
    assert mismatches("small", block, torch.randn(64, 64)) == 15


@pytest.mark.parametrize("text", ["", "!!", "AAA=", None, 7, "A" * 400])
def test_hostile_blocks(text):
    with pytest.raises(AsftError, match="the direction's fingerprint"):
        decode_block(text)
