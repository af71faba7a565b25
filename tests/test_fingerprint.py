"""One model is recognised however it is loaded; a near relative is not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_asft import AlignmentDirection, AlignmentPenalty
from axolotl_asft.errors import AsftError
from axolotl_asft.fingerprint import (
    BLOCK,
    MAX_MISMATCH,
    block_start,
    decode_block,
    encode_block,
    mismatches,
    with_scales,
)
from axolotl_asft.verify import verify_weights

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


def in_8bit(values: torch.Tensor, answered: bool = False) -> torch.Tensor:
    """As `verify_model` sees the weight of a bitsandbytes layer, which may have had its first forward pass."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(values.shape[1], values.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    if answered:
        layer(torch.ones(1, values.shape[1], dtype=torch.float16))
    assert (layer.weight.SCB is None) == answered
    return with_scales(layer.weight, layer)


def with_outliers(values: torch.Tensor) -> torch.Tensor:
    """Every row has one weight 12 times as large as its other ones."""
    values = values.clone()
    values[:, 7] = 12 * values.abs().amax(dim=1)
    return values


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


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit(dtype, answered):
    values = weight(dtype=dtype)
    loaded = in_8bit(values, answered)
    assert share(values, loaded) == 0
    assert share(relative_of(values), loaded) > 20 * MAX_MISMATCH
    assert share(weight(seed=5), loaded) > 0.9


def test_8bit_by_way_of_bf16():
    loaded = in_8bit(weight().bfloat16())
    assert share(weight(), loaded) == 0
    assert share(relative_of(weight()), loaded) > 20 * MAX_MISMATCH


@pytest.mark.parametrize("answered", [False, True])
def test_8bit_with_outliers(answered):
    """One large weight makes the steps of its whole row coarse."""
    values = with_outliers(weight())
    loaded = in_8bit(values, answered)
    assert share(values, loaded) == 0
    assert share(relative_of(values), loaded) > 2 * MAX_MISMATCH
    assert share(with_outliers(weight(seed=5)), loaded) > 0.5


def test_8bit_rows_of_zeros():
    values = weight()
    values[::2] = 0
    assert share(values, in_8bit(values)) == 0
    assert share(weight(), in_8bit(values)) > 0.3


def test_8bit_of_a_rounded_weight_with_a_part_taken_out():
    """What PEFT's OLoRA does: it takes a product out of the rounded weight, and rounds again."""
    generator = torch.Generator().manual_seed(2)
    A, B = 0.005 * torch.randn(4, 256, generator=generator), torch.randn(128, 4, generator=generator)
    rounded = in_8bit(weight())
    loaded = in_8bit(rounded.data.float() * rounded.SCB[:, None] / 127 - B @ A)

    def differing(other: torch.Tensor) -> float:
        blocks = {name: decode_block(encode_block(name, other)) for name in NAMES}
        return sum(mismatches(name, blocks[name], loaded, (A, B)) for name in NAMES) / (BLOCK * len(NAMES))

    assert differing(weight()) == 0
    assert differing(weight(seed=5)) > 0.5


def in_8bit_under_lora(folder):
    quantized = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def test_an_8bit_model_is_recognised_after_it_has_answered(pair, direction_file):
    direction = AlignmentDirection.load(direction_file)
    right, base = in_8bit_under_lora(pair[1]), in_8bit_under_lora(pair[0])
    for _ in range(2):
        assert len(AlignmentPenalty(right, direction).layers) == 14
        with pytest.raises(AsftError, match="extracted for another model"):
            AlignmentPenalty(base, direction)
        for model in (right, base):
            with torch.no_grad():
                model(input_ids=torch.tensor([[4, 5, 6]]))


def test_weights_that_cannot_be_compared_do_not_count(direction_file):
    """Integers without scales hide no mismatch elsewhere, and agree with nothing."""
    direction = AlignmentDirection.load(direction_file)
    integers = {name: torch.zeros(module.shape, dtype=torch.int8) for name, module in direction.modules.items()}
    name, values = next(iter(integers.items()))
    block = decode_block(direction.spec["aligned"]["fingerprint"]["blocks"][name])
    assert mismatches(name, block, values) is None
    with pytest.raises(AsftError, match="not loaded yet"):
        verify_weights(direction, [(name, values, None) for name, values in integers.items()])
    stranger = torch.randn(values.shape)
    with pytest.raises(AsftError, match=f"{BLOCK} of {BLOCK} sampled weights"):
        verify_weights(direction, [(n, stranger if n == name else w, None) for n, w in integers.items()])


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


def test_8_bit_floating_point_cannot_be_compared():
    block = weight().reshape(-1)[:BLOCK]
    assert mismatches("layer", block, weight().to(torch.float8_e4m3fn)) is None


@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_weights_that_are_no_numbers_are_another_model(kind):
    block = decode_block(encode_block(NAMES[0], weight()))
    broken = torch.full((128, 256), torch.nan)
    if kind == "nf4":
        broken = in_4bit(weight(), nested=False)
        broken.quant_state.absmax.fill_(torch.nan)
    elif kind == "int8":
        broken = in_8bit(weight())
        broken.SCB.fill_(torch.nan)
    assert mismatches(NAMES[0], block, broken) > 0.9 * BLOCK  # a code of 8 bits may be 0
