"""The activation metric: what layers are fed on safety prompts, kept in the direction file, used by the penalty."""

import json
from dataclasses import replace

import pytest
import torch
from test_adapter import UP, lora_model
from tiny import axolotl, make_tokenizer
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, AlignmentPenalty, extract_direction
from axolotl_asft.activations import layer_inputs
from axolotl_asft.errors import AsftError

TURNS = [("<|user|> the cat sees a dog </s><|assistant|> ", "yes no"), ("<|user|> red </s><|assistant|> ", "no")]


@pytest.fixture(scope="module")
def model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1]).eval()


@pytest.fixture(scope="module")
def inputs(model):
    return layer_inputs(model, make_tokenizer(), TURNS, list(linear(model)), rank=64)


@pytest.fixture(scope="module")
def direction(pair, inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("activations") / "tiny.asft.safetensors"
    extract_direction(*pair, rank=8, dtype="float32", activations=inputs).save(path)
    return AlignmentDirection.load(path)


def linear(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def dense_inputs(model, name):
    """The inputs of one layer, one text at a time, without padding; the first token left out."""
    kept = []
    handle = linear(model)[name].register_forward_pre_hook(lambda module, args: kept.append(args[0][0, 1:].double()))
    with torch.no_grad():
        for prompt, answer in TURNS:
            ids = make_tokenizer()(prompt + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
            model(input_ids=ids)
    handle.remove()
    return torch.cat(kept)


def test_against_the_dense_second_moment(model, inputs):
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        rows = dense_inputs(model, name)
        moment = rows.T @ rows / len(rows)
        moment *= moment.shape[0] / moment.trace()
        X = inputs.factors[name].double()
        assert float((X @ X.T - moment).norm() / moment.norm()) < 1e-2  # inputs are kept in bf16
        assert float((X @ X.T).trace()) == pytest.approx(X.shape[0], rel=1e-3)
        assert inputs.energy[name] == pytest.approx(1, abs=1e-3)
        assert inputs.tokens == len(rows)


def test_fewer_directions_are_the_leading_ones(model):
    few = layer_inputs(model, make_tokenizer(), TURNS, [UP], rank=2)
    all_of_them = layer_inputs(model, make_tokenizer(), TURNS, [UP], rank=64)
    values = torch.linalg.svdvals(all_of_them.factors[UP])
    torch.testing.assert_close(torch.linalg.svdvals(few.factors[UP]), values[:2], rtol=1e-4, atol=1e-4)
    assert few.energy[UP] == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()), rel=1e-3)


def test_no_hook_stays(model, inputs):
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_file_keeps_them(direction, inputs):
    for name, module in direction.modules.items():
        assert torch.equal(module.X, inputs.factors[name])
        assert module.X.shape[1] == direction.spec["modules"][name]["m"]
    assert direction.spec["activations"]["tokens"] == inputs.tokens


def test_norm_of_the_difference_in_the_metric(pair, direction):
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in pair)
    d = aligned[f"{UP}.weight"].double() - base[f"{UP}.weight"].double()
    module = direction.modules[UP]
    assert float(module.norm_X) == pytest.approx(float((d @ module.X.double()).norm()), rel=1e-4)


def test_the_penalty_measures_outputs(pair, direction):
    """P of one layer is |(I - C) dW x|^2 over its inputs x, up to the scale of the trace."""
    peft_model = lora_model(pair[1])
    penalty = AlignmentPenalty(
        peft_model, direction, projector="subspace", rank=4, metric="activations", modules=["0.mlp.up"]
    )
    delta = peft_model.get_submodule(f"base_model.model.{UP}").get_delta_weight("default").detach().double()
    U = direction.modules[UP].U[:, :4].double()
    rows = dense_inputs(AutoModelForCausalLM.from_pretrained(pair[1]), UP)
    outputs = rows @ delta.T
    off = outputs - outputs @ U @ U.T
    expected = float(off.square().sum() / rows.square().sum() * rows.shape[1])
    assert float(penalty()) == pytest.approx(expected, rel=1e-2)
    measured = penalty.measure()[0]
    assert measured.penalty == pytest.approx(float(penalty()), rel=1e-4)
    assert measured.relative == pytest.approx(expected**0.5 / float(direction.modules[UP].norm_X), rel=1e-2)
    penalty.shorten(0.5 * measured.relative)
    assert penalty.measure()[0].relative == pytest.approx(0.5 * measured.relative, rel=1e-3)


def test_added_gradients_are_those_of_autograd(pair, direction):
    peft_model = lora_model(pair[1])
    penalty = AlignmentPenalty(peft_model, direction, metric="activations")
    weights = [weight for weight in peft_model.parameters() if weight.requires_grad]
    expected = torch.autograd.grad(3 * penalty(), weights)
    penalty.add_gradient(3.0)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-7)


def test_a_file_without_activations_is_refused(pair, direction_file):
    with pytest.raises(AsftError, match=r"metric is 'activations', but the direction file holds none"):
        AlignmentPenalty(lora_model(pair[1]), AlignmentDirection.load(direction_file), metric="activations")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: replace(module, X=module.X[:, :-1]), "X has shape"),
        (lambda module: replace(module, X=module.X * float("nan")), "NaN"),
        (lambda module: replace(module, norm_X=-module.norm_X), "norm_X is negative"),
        (lambda module: replace(module, norm_X=None), "lacks the tensor"),
    ],
)
def test_damaged_files(direction, tmp_path, change, message):
    modules = {**direction.modules, UP: change(direction.modules[UP])}
    AlignmentDirection(modules, direction.spec).save(tmp_path / "bad.safetensors")
    with pytest.raises(AsftError, match=message):
        AlignmentDirection.load(tmp_path / "bad.safetensors")


def test_unknown_layers(model):
    with pytest.raises(AsftError, match=r"no layer model\.layers\.9"):
        layer_inputs(model, make_tokenizer(), TURNS, ["model.layers.9.mlp.up_proj"])


@pytest.mark.slow
def test_the_command(pair, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says no\n")
    output = tmp_path / "tiny.asft.safetensors"
    models = ["--base", str(pair[0]), "--aligned", str(pair[1])]
    options = ["--activations", str(tmp_path / "prompts.txt"), "--activation-rank", "4"]
    printed = axolotl("asft", "extract", *models, *options, "-o", str(output), "--json", cwd=tmp_path).stdout
    assert json.loads(printed)["modules"]
    module = AlignmentDirection.load(output).modules[UP]
    assert module.X.shape == (64, 4)
    assert float(module.norm_X) > 0
