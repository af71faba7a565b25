"""The LoRA layers of real PEFT models, matched to directions."""

import math
from dataclasses import replace

import pytest
import torch
from axolotl.utils.freeze import freeze_layers_except
from lora_models import UP, literal_formula_of, lora_model, untouched
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty, extract_direction
from axolotl_asft.diagnostics import DriftReport, adapter_drift
from axolotl_asft.errors import AsftError


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


@pytest.fixture(scope="module")
def full_direction(pair):
    return extract_direction(*pair, rank="full", dtype="float32")


def literal_formula(model, pair):
    return literal_formula_of(model, *(AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in pair))


def test_equals_the_literal_formula_of_the_authors_code(pair, full_direction):
    model = lora_model(pair[1])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected = literal_formula(model, pair)
    gradients = torch.autograd.grad(expected, weights)
    value = AlignmentPenalty(model, full_direction, projector="paper", lora_scaling=False)()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(value, weights), gradients, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_measure(pair, direction):
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction, projector="subspace")
    layers = {layer.name: layer for layer in penalty.measure()}
    assert sum(layer.orthogonal for layer in layers.values()) == pytest.approx(float(penalty()), rel=1e-5)
    delta = model.get_submodule(f"base_model.model.{UP}").get_delta_weight("default").detach()
    U = direction.modules[UP].U.float()
    assert layers[UP].total == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert layers[UP].orthogonal == pytest.approx(float((delta - U @ U.T @ delta).square().sum()), rel=1e-4)
    assert 0 < layers[UP].drift < 1


def test_weights_without_lora_are_looked_at_too(pair, direction):
    """LoRA on some layers alone: the others are the aligned model's, or it is another one."""
    for broken in (False, True):
        base = AutoModelForCausalLM.from_pretrained(pair[1])
        if broken:
            base.get_submodule(UP).weight.data += 0.1
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        if broken:
            with pytest.raises(AsftError, match="extracted for another model"):
                AlignmentPenalty(model, direction)
        else:
            assert len(AlignmentPenalty(model, direction).layers) == 2


def test_a_frozen_part_of_the_adapter_is_uncovered(pair, direction):
    """As `unfrozen_parameters` leaves an earlier adapter: what it did stays, and nothing holds it."""
    model = lora_model(pair[1])
    for name, weight in model.named_parameters():
        weight.requires_grad = weight.requires_grad and "q_proj" in name
    with pytest.raises(AsftError, match=r"12 LoRA layers do not train but still change the model \(first model"):
        AlignmentPenalty(model, direction)
    penalty = AlignmentPenalty(model, direction, on_uncovered="ignore")
    assert (len(penalty.layers), penalty.uncovered) == (2, 12)
    for name, weight in model.named_parameters():
        if "lora_B" in name and not weight.requires_grad:
            weight.data.zero_()
    assert AlignmentPenalty(model, direction).uncovered == 0


def test_fewer_directions(pair, direction):
    model = lora_model(pair[1])
    values = [float(AlignmentPenalty(model, direction, projector="subspace", rank=rank)()) for rank in (0, 1, 4, None)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4
    delta = sum(layer.total for layer in AlignmentPenalty(model, direction).measure())
    assert values[0] == pytest.approx(delta, rel=1e-5), "rank 0 is plain L2"


def test_modules(pair, direction):
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction, modules=[r"layers\.1\..*q_proj", "up_proj$"])
    assert [layer.name for layer in penalty.layers] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(AsftError, match="matches none of 14 layers"):
        AlignmentPenalty(model, direction, modules=["gate_projj"])


def test_uncovered_layers(pair, caplog):
    direction = extract_direction(*pair, rank=2, modules=["self_attn"])
    model = lora_model(pair[1])
    with pytest.raises(AsftError, match=r"6 LoRA layers without a direction \(first model.layers.0.mlp.gate_proj\)"):
        AlignmentPenalty(model, direction)
    assert len(AlignmentPenalty(model, direction, on_uncovered="warn").layers) == 8
    assert "does not cover 6 LoRA layers" in caplog.text
    caplog.clear()
    assert len(AlignmentPenalty(model, direction, on_uncovered="ignore").layers) == 8
    assert not caplog.text
    mlp = lora_model(pair[1], target_modules=["up_proj", "gate_proj", "down_proj"])
    with pytest.raises(AsftError, match=r"none of the 6 LoRA layers has a direction; .* use the direction of this mod"):
        AlignmentPenalty(mlp, direction, on_uncovered="ignore")


def test_modules_that_choose_nothing_that_is_covered(pair, direction):
    """The message speaks of the chosen layers, and not of the model's first, which has a direction."""
    model = lora_model(pair[1], target_modules=["q_proj", "lm_head"])
    message = (
        "^none of the LoRA layers that modules selects has a direction; the first of them is lm_head, the direction "
        f"file's first {next(iter(direction.modules))}; use the direction of this model, or select layers that it has$"
    )
    with pytest.raises(AsftError, match=message):
        AlignmentPenalty(model, direction, modules=["lm_head"])
    model = lora_model(pair[1])
    for name, weight in model.named_parameters():
        weight.requires_grad = weight.requires_grad and "q_proj" in name
    message = (
        r"^none of the LoRA layers that modules selects is trained \(first model.layers.0.mlp.up_proj\); select layers "
        "that are trained, such as model.layers.0.self_attn.q_proj$"
    )
    with pytest.raises(AsftError, match=message):
        AlignmentPenalty(model, direction, modules=["up_proj"])


def test_a_model_without_lora(pair, direction):
    with pytest.raises(AsftError, match="no trainable LoRA layers"):
        AlignmentPenalty(AutoModelForCausalLM.from_pretrained(pair[1]), direction)
    model = lora_model(pair[1])
    freeze_layers_except(model, ["^model.layers.*"])  # not as PEFT names them, which begin with base_model.model.
    message = r"^none of the model's 14 LoRA layers trains \(first model.layers.0.*\); leave out unfrozen_parameters"
    with pytest.raises(AsftError, match=message):
        AlignmentPenalty(model, direction)


def test_bad_options(pair, direction):
    model = lora_model(pair[1])
    for options, message in (
        ({"projector": "papper"}, "projector is 'papper'; expected one of paper, normalized, subspace"),
        ({"on_uncovered": "skip"}, "on_uncovered is 'skip'"),
        ({"rank": -1}, "rank is -1"),
    ):
        with pytest.raises(AsftError, match=message):
            AlignmentPenalty(model, direction, **options)


@pytest.mark.parametrize("quantized", [None, "single", "double"])
def test_the_model_is_recognised(pair, direction, quantized):
    """4-bit weights of the right model pass; the base model's, which differ by a few percent, do not."""
    assert len(AlignmentPenalty(lora_model(pair[1], quantized), direction).layers) == 14
    with pytest.raises(AsftError, match="extracted for another model"):
        AlignmentPenalty(lora_model(pair[0], quantized), direction)
    assert AlignmentPenalty(lora_model(pair[0], quantized), direction, verify_model=False)


def narrow(direction):
    """The direction of a model of a quarter the width."""
    modules = {name: replace(m, U=m.U[:16], in_features=16) for name, m in direction.modules.items()}
    return AlignmentDirection(modules, direction.spec)


def test_a_direction_of_other_shapes(pair, direction):
    with pytest.raises(AsftError, match=r"\(out, in\) in the model and \(16, 16\) in the direction"):
        AlignmentPenalty(lora_model(pair[1]), narrow(direction))


def test_a_layer_that_alignment_left_alone_has_no_yardstick(pair, direction, tmp_path):
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, untouched(direction, "up_proj"), projector="subspace")
    report = DriftReport(tuple(penalty.measure()))
    known = [layer.relative for layer in report.layers if not layer.name.endswith("up_proj")]
    alone = [layer for layer in report.layers if layer.name.endswith("up_proj")]
    assert len(alone) == 2
    assert all(math.isnan(layer.relative) and not layer.has_yardstick and layer.drift == 1 for layer in alone)
    assert report.max_drift == max(known) > 0
    model.save_pretrained(tmp_path)
    saved = adapter_drift(tmp_path, untouched(direction, "up_proj"), "subspace")
    assert saved.max_drift == pytest.approx(report.max_drift, rel=1e-3)
    everywhere = AlignmentPenalty(model, untouched(direction, "proj"))
    assert math.isnan(DriftReport(tuple(everywhere.measure())).max_drift), "nothing to hold it against, and not 0"
    for layer in penalty.layers:
        layer.B.data.zero_()
    assert DriftReport(tuple(everywhere.measure())).max_drift == 0, "nothing has moved"


def test_one_layer_that_is_not_finite(pair, direction):
    penalty = AlignmentPenalty(lora_model(pair[1]), direction)
    penalty.layers[3].B.data[0] = math.nan
    report = DriftReport(tuple(penalty.measure()))
    assert [layer.has_yardstick for layer in report.layers] == [True] * 14
    for number in (report.drift, report.update_norm, report.penalty, report.max_drift):
        assert math.isnan(number)
    assert sum(math.isnan(layer.relative) for layer in report.layers) == 1


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 32}}])
def test_a_saved_adapter_measures_the_same(pair, direction, tmp_path, changes):
    model = lora_model(pair[1], **changes)
    model.save_pretrained(tmp_path)
    saved = adapter_drift(tmp_path, direction, "subspace", rank=4)
    live = {layer.name: layer for layer in AlignmentPenalty(model, direction, projector="subspace", rank=4).measure()}
    for layer in saved.layers:
        assert layer.total == pytest.approx(live[layer.name].total, rel=1e-5)
        assert layer.orthogonal == pytest.approx(live[layer.name].orthogonal, rel=1e-4)
    with pytest.raises(AsftError, match=r"\(out, in\) in the adapter and \(16, 16\) in the direction"):
        adapter_drift(tmp_path, narrow(direction))
    with pytest.raises(AsftError, match=r"there is no folder .*nothing; expected the folder of a PEFT adapter"):
        adapter_drift(tmp_path / "nothing", direction)
