"""Every kind of LoRA that PEFT makes: P against the dense change of the weights, or one clear line."""

import pytest
import torch
from lora_models import lora_model, shake
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty
from axolotl_asft.diagnostics import adapter_drift
from axolotl_asft.errors import AsftError

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


def dense_penalty(model, direction, original):
    """sum_l ||(I - U diag(c) U^T) dW_l||_F^2 in fp64: dW is what merging the adapter would change, as PEFT says it."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        name = name.removeprefix(PREFIX)
        if name not in direction.modules or not hasattr(module, "get_delta_weight"):
            continue
        base = module.get_base_layer().weight.detach()
        if hasattr(base, "quant_state"):
            change = torch.zeros((), dtype=torch.float64)
        else:
            change = base.double() - original[f"{name}.weight"].double()
        adapter = module.active_adapters[0]
        A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
        delta = module.scaling[adapter] * B @ A
        torch.testing.assert_close(delta.float(), module.get_delta_weight(adapter), rtol=1e-4, atol=1e-6)
        entry = direction.modules[name]
        U, c = entry.U.double(), (entry.S.double() ** 2 / entry.norm.double())
        update = change + delta
        total = total + (update - U @ (c[:, None] * (U.T @ update))).square().sum()
    return total


KINDS = {
    "alpha over r": {},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"up": 32}},
    "named targets": {"target_modules": ["q_proj", "v_proj"]},
    "regex targets": {"target_modules": r".*layers\.1.*\.(up|down)_proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random from the start": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_that_of_the_dense_change(pair, direction, kind):
    """Of the change from the aligned weight of the checkpoint, also where the initialisation changed the weight."""
    original = load_file(str(pair[1] / "model.safetensors"))
    model = lora_model(pair[1], random_b=False, **KINDS[kind])
    penalty = AlignmentPenalty(model, direction)
    shake(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected = dense_penalty(model, direction, original)
    assert len(penalty.layers) == len([name for name, _ in model.named_modules() if name.endswith("lora_A")])
    assert float(expected.detach()) > 0
    value = penalty()
    assert value.item() == pytest.approx(expected.item(), rel=2e-4)
    wanted = torch.autograd.grad(expected, weights)
    for got in (torch.autograd.grad(value, weights), added_gradients(penalty, weights)):
        for one, other in zip(got, wanted, strict=True):
            assert float((one - other).norm()) <= 1e-3 * float(other.norm()) + 1e-7


def added_gradients(penalty, weights):
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    value = penalty.add_gradient(0.5)
    assert float(value) == pytest.approx(float(penalty().detach()), rel=1e-5)
    return [2 * (weight.grad - 1) for weight in weights]


@pytest.mark.parametrize("kind", ["PiSSA", "fast PiSSA", "OLoRA", "alpha over r"])
def test_the_change_is_zero_at_the_start(pair, direction, kind):
    penalty = AlignmentPenalty(lora_model(pair[1], random_b=False, **KINDS[kind]), direction)
    assert float(penalty()) == 0
    assert all(layer.total == 0 for layer in penalty.measure())


@pytest.mark.parametrize("kind", ["PiSSA", "OLoRA"])
def test_the_weight_without_its_initial_part_is_recognised(pair, direction, kind):
    with pytest.raises(AsftError, match="extracted for another model"):
        AlignmentPenalty(lora_model(pair[0], random_b=False, **KINDS[kind]), direction)


def test_a_saved_pissa_adapter_does_not_say_its_change(pair, direction, tmp_path):
    lora_model(pair[1], random_b=False, init_lora_weights="pissa").save_pretrained(tmp_path)
    with pytest.raises(AsftError, match="initialised by 'pissa', so that B A need not be the change from the original"):
        adapter_drift(tmp_path, direction)


def test_olora_in_4_bit(pair, direction):
    """PEFT takes the initial part out of the dequantised weight and rounds the rest again."""
    model = lora_model(pair[1], "single", random_b=False, init_lora_weights="olora")
    penalty = AlignmentPenalty(model, direction, verify_model=False)
    assert float(penalty()) == 0
    shake(model)
    assert float(penalty()) > 0


def test_loftq(pair, direction):
    """The weight is replaced by a rounded one: what trains is B A - B0 A0, and the model cannot be recognised.

    PEFT's own LoftQ needs CUDA (see the test below); this is its first iteration, by hand.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = lora_model(pair[1], random_b=False)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                weight = module.get_base_layer().weight
                rounded = dequantize_4bit(*quantize_4bit(weight.data, quant_type="nf4"))
                U, S, V = torch.linalg.svd(weight.data - rounded, full_matrices=False)
                module.lora_B["default"].weight.data = U[:, :4] * S[:4].sqrt() / 2
                module.lora_A["default"].weight.data = S[:4].sqrt()[:, None] * V[:4]
                weight.data = rounded
    model.peft_config["default"].init_lora_weights = "loftq"
    assert_loftq_is_constrained(model, direction)


@pytest.mark.gpu
def test_loftq_of_peft(pair, direction):
    changes = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    assert_loftq_is_constrained(lora_model(pair[1], random_b=False, **changes), direction)


def assert_loftq_is_constrained(model, direction):
    with pytest.raises(AsftError, match=r"LoftQ replaced the weights with rounded ones.*set verify_model: false"):
        AlignmentPenalty(model, direction)
    penalty = AlignmentPenalty(model, direction, projector="subspace", rank=0, verify_model=False)
    assert float(penalty()) == 0
    before = {layer.name: layer.layer.get_delta_weight("default").detach() for layer in penalty.layers}
    assert all(float(delta.norm()) > 0 for delta in before.values())
    shake(model)
    expected = sum(
        float((layer.layer.get_delta_weight("default") - before[layer.name]).detach().square().sum())
        for layer in penalty.layers
    )
    assert float(penalty()) == pytest.approx(expected, rel=1e-3)


def test_a_frozen_factor_gets_no_gradient(pair, direction):
    model = shake(lora_model(pair[1]))
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    AlignmentPenalty(model, direction).add_gradient()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == ("lora_B" in name)


def test_the_active_adapter_is_constrained(pair, direction):
    model = lora_model(pair[1])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    model.set_adapter("second")
    penalty = AlignmentPenalty(model, direction)
    assert {layer.adapter for layer in penalty.layers} == {"second"}
    assert float(penalty()) == 0
    shake(model)
    penalty.add_gradient()
    got = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert got
    assert all(".second." in name for name in got)


def test_two_adapters_that_train_at_once(pair, direction):
    model = lora_model(pair[1])
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AsftError, match="trains two adapters at once, default and second"):
        AlignmentPenalty(model, direction)


def test_a_frozen_second_adapter_is_left_alone(pair, direction):
    """As the reference adapter of DPO."""
    model = lora_model(pair[1])
    model.add_adapter("ref", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    penalty = AlignmentPenalty(model, direction)
    assert {layer.adapter for layer in penalty.layers} == {"default"}


UNCOVERED = {
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        r"1 trainable weights that are not LoRA layers \(first lm_he",
    ),
    "lora_bias": ({"lora_bias": True}, "14 trainable weights that are not LoRA layers"),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        r"2 trainable weights that are not LoRA layers \(first model.embed_tokens",
    ),
    "trainable tokens": ({"trainable_token_indices": [4, 5]}, "1 trainable weights that are not LoRA layers"),
}


@pytest.mark.parametrize("kind", UNCOVERED)
def test_other_trained_weights_are_uncovered(pair, direction, caplog, kind):
    changes, message = UNCOVERED[kind]
    with pytest.raises(AsftError, match=message):
        AlignmentPenalty(lora_model(pair[1], **changes), direction)
    AlignmentPenalty(lora_model(pair[1], **changes), direction, on_uncovered="warn")
    assert "does not cover" in caplog.text


REFUSED = {
    "DoRA": ({"use_dora": True}, r"uses DoRA, which also rescales .* use plain LoRA, without peft_use_dora"),
    "MiCA": ({"init_lora_weights": "mica"}, "uses MiCALinearVariant, whose update is not scaling B A; use plain LoRA"),
    "ALoRA": ({"alora_invocation_tokens": [4, 5]}, "whose update is not scaling B A; use plain LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds(pair, direction, kind):
    changes, message = REFUSED[kind]
    with pytest.raises(AsftError, match=message):
        AlignmentPenalty(lora_model(pair[1], **changes), direction)


def test_an_initialisation_that_is_not_known(pair, direction):
    model = lora_model(pair[1])
    model.peft_config["default"].init_lora_weights = "corda"
    with pytest.raises(AsftError, match="initialised by 'corda', which the constraint does not know; leave peft_init"):
        AlignmentPenalty(model, direction)


def test_a_loaded_adapter_goes_on_from_where_it_was(pair, direction, tmp_path):
    """`lora_model_dir`: the change is that of the whole adapter, from the aligned weights, not from its start."""
    from peft import PeftModel

    first = shake(lora_model(pair[1]))
    first.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path, is_trainable=True)
    assert float(AlignmentPenalty(again, direction)()) == pytest.approx(float(AlignmentPenalty(first, direction)()))


def test_a_model_with_its_adapter_inside(pair, direction):
    """`inject_adapter_in_model` and transformers' own `add_adapter` make LoRA layers without a PeftModel around."""
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    penalty = AlignmentPenalty(model, direction)
    assert [layer.name for layer in penalty.layers][:1] == ["model.layers.0.self_attn.q_proj"]


def test_names_inside_wrappers(pair, direction):
    """Names are the Hugging Face model's, whatever is around it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(r=4, target_modules=["q_proj"]))
    compiled = torch.compile(model)
    names = [layer.name for layer in AlignmentPenalty(compiled, direction).layers]
    assert names == [layer.name for layer in AlignmentPenalty(model, direction).layers]
