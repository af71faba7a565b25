"""decoupled: the penalty's own step after the optimizer's, and the damping that goes with it."""

import pytest
import torch
from test_adapter import lora_model
from test_attach import lora_weights, make_trainer, training_lines
from tiny import write_config

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach, extract_direction
from axolotl_asft.errors import AsftError
from axolotl_asft.metrics import LayerMetric

DAMPING = 0.1


@pytest.fixture(scope="module")
def direction(pair, tmp_path_factory):
    """With a made Fisher metric of other widths in every layer."""
    plain = extract_direction(*pair, rank=4, dtype="float32")
    generator = torch.Generator().manual_seed(7)
    inputs, outputs = {}, {}
    for i, (name, module) in enumerate(plain.modules.items()):
        inputs[name] = torch.randn(module.shape[1], 5 + i % 3, generator=generator)
        outputs[name] = torch.randn(module.shape[0], 4 + i % 2, generator=generator)
    metric = LayerMetric("fisher", inputs, outputs, dict.fromkeys(inputs, 0.9), answers=1)
    path = tmp_path_factory.mktemp("decoupled") / "tiny.asft.safetensors"
    extract_direction(*pair, rank=4, dtype="float32", metrics=[metric]).save(path)
    return AlignmentDirection.load(path)


def damped(S):
    """S S^T + damping mean(S S^T) I."""
    S = S.double()
    return S @ S.T + DAMPING * S.square().sum() / len(S) * torch.eye(len(S), dtype=torch.float64)


def dense(layer, direction, A, B):
    """tr(K_Y dW K_X dW^T), written out."""
    metric = direction.modules[layer.name].metrics["fisher"]
    update = layer.scaling * B.double() @ A.double()
    return torch.trace(damped(metric.outputs) @ update @ damped(metric.inputs) @ update.T)


@pytest.fixture
def penalty(pair, direction):
    return AlignmentPenalty(lora_model(pair[1]), direction, damping=DAMPING)


def test_damping_against_the_dense_formula(penalty, direction):
    expected = sum(dense(layer, direction, layer.A, layer.B) for layer in penalty.layers)
    weights = [weight for layer in penalty.layers for weight in (layer.A, layer.B)]
    gradients = torch.autograd.grad(expected, weights)
    value = penalty()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(value, weights), gradients, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert float(penalty.add_gradient(2.0)) == pytest.approx(float(expected), rel=1e-5)
    for weight, wanted in zip(weights, gradients, strict=True):
        assert float((weight.grad - 2 * wanted).norm() / wanted.norm()) < 1e-5
    measured = {layer.name: layer.penalty for layer in penalty.measure()}
    for layer in penalty.layers:
        assert measured[layer.name] == pytest.approx(float(dense(layer, direction, layer.A, layer.B)), rel=1e-4)


@pytest.mark.parametrize("metric", ["fisher", "weights"])
@pytest.mark.parametrize("weight", [1e-3, 10.0])
def test_the_step_is_at_the_minimum_of_b_and_then_of_a(pair, direction, metric, weight):
    """Where a step ends, its own pull and the penalty's gradient cancel."""
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction, projector="subspace", metric=metric, damping=DAMPING)
    before = {layer.name: (layer.A.detach().clone(), layer.B.detach().clone()) for layer in penalty.layers}
    value = float(penalty().detach())
    assert float(penalty.proximal_step(lambda _: weight)) == pytest.approx(value, rel=1e-4)
    assert float(penalty().detach()) < value
    after = {layer.name: (layer.A.detach().clone(), layer.B.detach().clone()) for layer in penalty.layers}
    for which in (1, 0):  # B moved first, under the A from before
        for layer in penalty.layers:
            A, B = after[layer.name]
            layer.A.data, layer.B.data = (before[layer.name][0] if which else A).clone(), B.clone()
            layer.A.grad = layer.B.grad = None
        penalty.add_gradient(weight)
        for layer in penalty.layers:
            moved = after[layer.name][which] - before[layer.name][which]
            pull = (layer.A, layer.B)[which].grad
            assert float((moved + pull).norm()) < 1e-3 * float(moved.norm()) + 1e-6


def test_small_steps_are_those_of_the_gradient(pair, rows, direction, tmp_path):
    """With SGD and a small learning rate, both forms train the same weights."""
    final = []
    for decoupled in (False, True):
        trainer = make_trainer(pair, rows, tmp_path / str(decoupled), learning_rate=1e-6, max_steps=4)
        start = lora_weights(trainer)
        attach(trainer, direction, 0.3, decoupled=decoupled, damping=0.0)
        trainer.train()
        final.append({name: weight - start[name] for name, weight in lora_weights(trainer).items()})
    for name, moved in final[0].items():
        assert float((final[1][name] - moved).norm()) < 0.02 * float(moved.norm()), name


def test_it_counts_once_whatever_the_accumulation(pair, rows, direction, tmp_path):
    final = []
    for micro, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / str(micro)
        trainer = make_trainer(pair, rows, folder, micro=micro, accumulation=accumulation, max_steps=3)
        attach(trainer, direction, 100.0, decoupled=True)
        trainer.train()
        final.append(lora_weights(trainer))
    for name, weight in final[0].items():
        torch.testing.assert_close(final[1][name], weight, rtol=1e-4, atol=1e-6)


def test_a_large_lambda_holds_and_leaves_the_gradient_alone(pair, rows, direction, tmp_path):
    lines, penalties = {}, {}
    for lambda_reg in (0.0, 1e8):
        trainer = make_trainer(
            pair, rows, tmp_path / str(lambda_reg), optim="adamw_torch", max_steps=6, max_grad_norm=1.0
        )
        constraint = attach(trainer, direction, lambda_reg, decoupled=True)
        trainer.train()
        lines[lambda_reg] = training_lines(trainer)
        penalties[lambda_reg] = constraint.report().penalty
    assert lines[1e8][0]["grad_norm"] == pytest.approx(lines[0.0][0]["grad_norm"], rel=1e-6)
    assert penalties[1e8] < 1e-4 * penalties[0.0]
    assert constraint.stamp() | {"decoupled": True, "damping": 0.01} == constraint.stamp()
    assert constraint.penalty_peak() > 0


def test_each_parameter_has_the_learning_rate_of_its_group(pair, rows, direction, tmp_path):
    """LoRA+ and its like: B learns faster than A."""
    trainer = make_trainer(pair, rows, tmp_path, max_steps=2)
    named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in named if kind in name], "lr": rate}
        for kind, rate in (("lora_A", 1e-3), ("lora_B", 5e-3))
    ]
    trainer.optimizer = torch.optim.SGD(groups)
    constraint = attach(trainer, direction, 2.0, decoupled=True)
    seen = set()
    step = constraint.penalty.proximal_step

    def noted(weight_of):
        layer = constraint.penalty.layers[0]
        seen.add((round(weight_of(layer.A), 9), round(weight_of(layer.B), 9)))
        return step(weight_of)

    constraint.penalty.proximal_step = noted
    trainer.train()
    assert seen == {(2e-3, 1e-2)}


def test_what_it_is_not_worked_out_for(pair, rows, direction, tmp_path):
    with pytest.raises(AsftError, match="decoupled with metric fisher and rank 2 is not worked out"):
        attach(make_trainer(pair, rows, tmp_path), direction, decoupled=True, rank=2)
    with pytest.raises(AsftError, match="damping is -1"):
        attach(make_trainer(pair, rows, tmp_path), direction, damping=-1.0)


def test_initialisations_that_are_taken_out_of_the_weight(pair, rows, direction, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(pair, rows, tmp_path)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    trainer.model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    with pytest.raises(AsftError, match="decoupled cannot hold"):
        attach(trainer, direction, decoupled=True, verify_model=False)


def test_an_optimizer_that_does_not_hold_the_weights(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    some = next(weight for name, weight in trainer.model.named_parameters() if "lora_A" in name)
    trainer.optimizer = torch.optim.SGD([some], lr=1e-3)
    attach(trainer, direction, 1.0, decoupled=True)
    with pytest.raises(AsftError, match="the optimizer does not hold"):
        trainer.train()


def test_axolotl_trains_with_it(forked_train, pair, dataset, direction_file, tmp_path):
    """From the YAML, in 4 bit."""
    block = {"direction": str(direction_file), "lambda_reg": 1e6, "decoupled": True, "projector": "subspace"}
    status, output = forked_train(write_config(tmp_path, pair[1], dataset, block, max_steps=3))
    assert status == 0, output
    assert "lambda_reg 1e+06 (decoupled)" in output
