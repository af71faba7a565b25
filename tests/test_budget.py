"""max_drift: no layer leaves the direction by more than a multiple of what alignment moved it."""

import logging

import pytest
import torch
from lora_models import lora_model, shake, untouched
from schedulefree import AdamWScheduleFree
from trainers import lora_weights, make_trainer, training_lines
from transformers import TrainerCallback

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach, extract_direction, layer_groups
from axolotl_asft.args import parse_block
from axolotl_asft.engines import refuse_optimizer
from axolotl_asft.errors import AsftError
from axolotl_asft.penalty import projector_eigenvalues


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


def relative(penalty):
    return {layer.name: layer.relative for layer in penalty.measure()}


@pytest.mark.parametrize("projector", ["paper", "normalized", "subspace"])
def test_shortened_to_the_budget_against_dense_matrices(pair, direction, projector):
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction, projector=projector, rank=4)
    before = {layer.name: layer.scaling * (layer.B @ layer.A).detach().double() for layer in penalty.layers}
    wanted = 0.5 * min(relative(penalty).values())
    penalty.shorten(wanted)
    for layer in penalty.layers:
        module = direction.modules[layer.name]
        U, c = module.U[:, :4].double(), projector_eigenvalues(projector, module.S, module.norm)[:4].double()
        off = torch.eye(len(U), dtype=torch.float64) - U @ torch.diag(c) @ U.T
        after = layer.scaling * (layer.B @ layer.A).detach().double()
        size = float(direction.modules[layer.name].norm)
        assert float(torch.linalg.matrix_norm(off @ after)) == pytest.approx(wanted * size, rel=1e-2)  # U is bf16
        factor = float(torch.linalg.matrix_norm(off @ after) / torch.linalg.matrix_norm(off @ before[layer.name]))
        free = torch.linalg.qr(U[:, c == 1])[0]  # U is bf16
        expected = factor * before[layer.name] + (1 - factor) * free @ (free.T @ before[layer.name])
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_what_is_free_stays_over_a_thousand_steps(pair, direction):
    """The stored columns are rounded to bf16, and so are not quite orthonormal: what that bends must not add up."""
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction, projector="subspace")
    (layer, *_), budget = penalty.layers, 0.5 * min(relative(penalty).values())
    U = torch.linalg.qr(direction.modules[layer.name].U.double())[0]
    inside = U @ (U.T @ layer.B.detach().double())
    for _ in range(1000):
        with torch.no_grad():
            orthogonal = layer.B.double() - U @ (U.T @ layer.B.double())
            layer.B.copy_(inside + 1.1 * orthogonal)
        penalty.shorten(budget)
        inside = U @ (U.T @ layer.B.detach().double())
    model = lora_model(pair[1])
    before = AlignmentPenalty(model, direction, projector="subspace").layers[0].B.detach().double()
    torch.testing.assert_close(inside, U @ (U.T @ before), rtol=0, atol=1e-3 * float(before.abs().max()))


def test_what_is_within_the_budget_is_left_alone(pair, direction):
    model = lora_model(pair[1])
    penalty = AlignmentPenalty(model, direction)
    before = [layer.B.detach().clone() for layer in penalty.layers]
    assert float(penalty.shorten(1.01 * max(relative(penalty).values()))) == 1
    assert all(torch.equal(layer.B, kept) for layer, kept in zip(penalty.layers, before, strict=True))
    penalty.shorten(0.3)
    once = relative(penalty)
    penalty.shorten(0.3)
    assert relative(penalty) == pytest.approx(once, rel=1e-5)


def test_a_layer_that_alignment_left_alone_stays(pair, direction):
    penalty = AlignmentPenalty(lora_model(pair[1]), direction)
    penalty.groups[0].sizes[0] = 0.0
    penalty.shorten(1.0)
    first, second, *_ = penalty.groups[0].found
    assert not first.B.any()
    assert second.B.any()


@pytest.mark.parametrize(("lambda_reg", "projector"), [(0.0, "paper"), (5.0, "subspace")])
def test_kept_after_every_step(pair, rows, direction, tmp_path, lambda_reg, projector):
    trainer = make_trainer(pair, rows, tmp_path, optim="adamw_torch", max_steps=12, accumulation=2, micro=2)
    constraint = attach(trainer, direction, lambda_reg, max_drift=0.4, projector=projector)
    trainer.train()
    reached = [line["asft/max_drift"] for line in training_lines(trainer)]
    assert len(reached) == 12
    assert max(reached) <= 0.4 * 1.001
    assert reached[-1] == pytest.approx(0.4, rel=1e-2), "the task pushes against the budget"
    assert constraint.stamp()["max_drift"] == 0.4
    losses = [line["loss"] for line in training_lines(trainer)]
    assert losses[-1] < losses[0], "and learns within it"


def test_a_wide_budget_is_no_constraint(pair, rows, direction, tmp_path):
    final = []
    for budget in (None, 1e6):
        trainer = make_trainer(pair, rows, tmp_path / str(budget), max_steps=3)
        attach(trainer, direction, 0.0, max_drift=budget)
        trainer.train()
        final.append(lora_weights(trainer))
    assert all(torch.equal(final[1][name], weight) for name, weight in final[0].items())


def test_a_budget_stands_alone_unless_lambda_is_given(pair, rows, direction, tmp_path):
    for options, expected in (({}, 1), ({"max_drift": 0.5}, 0), ({"max_drift": 0.5, "lambda_reg": 2}, 2)):
        assert attach(make_trainer(pair, rows, tmp_path), direction, **options).lambda_reg == expected


def test_a_budget_of_0_is_none(pair, rows, direction, tmp_path):
    """As the command line takes one back, which has no null."""
    constraint = attach(make_trainer(pair, rows, tmp_path), direction, max_drift=0)
    assert (constraint.max_drift, constraint.lambda_reg) == (None, 1)
    assert parse_block({"direction": "d", "max_drift": 0}).max_drift is None


@pytest.mark.parametrize("budget", ["1", -1.0, float("nan"), float("inf"), True])
def test_bad_budgets(pair, rows, direction, tmp_path, budget):
    with pytest.raises(AsftError, match="max_drift is"):
        attach(make_trainer(pair, rows, tmp_path), direction, max_drift=budget)


def test_layers_that_the_budget_freezes_are_named(pair, rows, direction, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "axolotl.asft"):
        attach(make_trainer(pair, rows, tmp_path), direction, max_drift=0.5)
        attach(make_trainer(pair, rows, tmp_path), untouched(direction, "up_proj"), 1.0)
        assert "learn nothing" not in caplog.text
        attach(make_trainer(pair, rows, tmp_path), untouched(direction, "up_proj"), max_drift=0.5)
    assert "max_drift lets 2 of 14 layers learn nothing" in caplog.text
    assert "(first model.layers.0.mlp.up_proj)" in caplog.text


def test_a_step_that_no_budget_followed_is_noticed(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    constraint = attach(trainer, direction, 0.0, max_drift=0.5)
    constraint.keep_budget = lambda: None
    with pytest.raises(AsftError, match="3 steps were trained, 0 of them constrained"):
        trainer.train()


def test_initialisations_that_are_taken_out_of_the_weight(pair, rows, direction, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(pair, rows, tmp_path)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    trainer.model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    with pytest.raises(AsftError, match="max_drift cannot shorten"):
        attach(trainer, direction, max_drift=0.5, verify_model=False)


def test_a_frozen_b_cannot_be_shortened(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.requires_grad_(False)
    with pytest.raises(AsftError, match="whose B does not train"):
        attach(trainer, direction, max_drift=0.5)


def test_factors_that_cancel_stay_numbers(pair, rows, direction, tmp_path):
    """Orthogonal initialisation begins at B A = 0 with large factors: the product of their squares rounds below 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(pair, rows, tmp_path, learning_rate=1e-5)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights="orthogonal")
    trainer.model = trainer.model_wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config)
    attach(trainer, direction, max_drift=0.5)
    trainer.train()
    assert all(weight.isfinite().all() for weight in lora_weights(trainer).values())


def test_a_run_under_a_budget_that_diverged_is_no_adapter(pair, rows, direction, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            next(w for w in kwargs["model"].parameters() if w.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    attach(trainer, direction, max_drift=0.5)
    trainer.add_callback(Break())
    with pytest.raises(AsftError, match="no longer finite"):
        trainer.train()


def test_the_number_means_the_same_for_a_model_of_another_scale(pair, rows, tmp_path):
    """W and d ten times as large, and an update ten times as large: the same share of the budget."""
    small = extract_direction(*pair, rank=8)
    layers = AlignmentPenalty(lora_model(pair[1]), small)
    shares = relative(layers)
    for group in layers.groups:
        group.sizes *= 10
    for layer in layers.layers:
        layer.B.data *= 10
    assert relative(layers) == pytest.approx(shares, rel=1e-5)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_an_optimizer_that_saves_other_weights_than_it_trains_is_refused(name):
    """Schedule-free averages lie between two weights, one of which no budget sees."""
    refuse_optimizer(name, None)
    with pytest.raises(AsftError, match=f"optimizer {name} evaluates and saves an average of the weights, which max_"):
        refuse_optimizer(name, 0.1)


def test_an_optimizer_of_one_s_own_that_does_so_is_refused_too(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.optimizer = AdamWScheduleFree(weights, lr=1e-3)
    attach(trainer, direction, max_drift=0.1)
    with pytest.raises(AsftError, match="optimizer AdamWScheduleFree evaluates and saves an average"):
        trainer.train()


@pytest.mark.parametrize("grown", [1.0, 1.5])
def test_what_ends_past_the_budget_is_no_adapter(pair, rows, direction, tmp_path, grown):
    """Whoever changes the weights after their steps: the stamp would promise what is not so."""

    class Grow(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight *= grown

    trainer = make_trainer(pair, rows, tmp_path)
    constraint = attach(trainer, direction, max_drift=0.05)
    trainer.add_callback(Grow())
    if grown == 1:
        trainer.train()
        assert constraint.trained().stamp["max_drift"] == 0.05
        return
    with pytest.raises(AsftError, match=r"the update ended at 0.075 times what alignment moved, past max_drift 0.05"):
        trainer.train()
    with pytest.raises(AsftError, match="do not use this adapter"):
        constraint.trained()


def test_weights_in_half_precision_may_round_past_it(pair, rows, direction, tmp_path):
    """What is free in the subspace is large beside a small budget, and its rounding too."""
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.model.to(torch.bfloat16)
    constraint = attach(trainer, direction, max_drift=1e-4, projector="subspace", verify_model=False)
    trainer.train()
    assert constraint.report().max_drift > 1.01e-4
    assert constraint.trained().stamp["max_drift"] == 1e-4


def test_it_is_measured_and_kept_without_tf32(pair, direction, monkeypatch):
    """(I - C) B is a difference of nearly equal numbers where the update lies along the direction."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    allowed, before = ("tf32" if name == "fp32_precision" else True), getattr(matmul, name)
    seen, orthogonal_part = [], layer_groups.orthogonal_part

    def look(*factors):
        seen.append(getattr(matmul, name))
        return orthogonal_part(*factors)

    monkeypatch.setattr(layer_groups, "orthogonal_part", look)
    penalty = AlignmentPenalty(shake(lora_model(pair[1])), direction)
    setattr(matmul, name, allowed)
    try:
        penalty.measure()
        penalty.shorten(0.1)
        assert len(seen) > 1
        assert allowed not in seen
        assert getattr(matmul, name) == allowed
    finally:
        setattr(matmul, name, before)
