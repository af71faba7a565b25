"""The constraint in a plain transformers Trainer: once per optimizer step, and only the gradient of it."""

import gc
import json
import logging
import math
import types
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from peft import LoraConfig
from trainers import lora_weights, make_trainer, training_lines
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach
from axolotl_asft.errors import AsftError
from axolotl_asft.history import read_history
from axolotl_asft.resuming import STAMP_FILE, peak_before, refuse_other_constraint
from axolotl_asft.stamp import read_stamp

LAMBDA = 20.0


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


@pytest.mark.parametrize("loss_kwargs", [True, False])
def test_the_penalty_counts_once_per_optimizer_step(pair, rows, direction, tmp_path, loss_kwargs):
    """Weights after 3 steps do not depend on how 8 rows are split into micro-batches."""
    final = []
    for micro, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(pair, rows, tmp_path / str(micro), micro, accumulation, loss_kwargs)
        attach(trainer, direction, LAMBDA, projector="subspace")
        trainer.train()
        final.append(lora_weights(trainer))
    for other in final[1:]:
        for name, weight in final[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=2e-5)


def assert_differ_by_the_closed_form(pair, rows, direction, folder, options, prepare=None, rtol=1e-3, atol=1e-6):
    """After one step of SGD the two runs differ by learning rate x lambda x gradient of P, and by nothing else."""
    prepare = prepare or (lambda trainer: trainer)
    plain = prepare(make_trainer(pair, rows, folder / "plain", **options))
    constrained = prepare(make_trainer(pair, rows, folder / "asft", **options))
    penalty = AlignmentPenalty(plain.model, direction)
    weights = {name: weight for name, weight in plain.model.named_parameters() if weight.requires_grad}
    gradients = dict(zip(weights, torch.autograd.grad(penalty(), list(weights.values())), strict=True))
    attach(constrained, direction, LAMBDA)
    plain.train()
    constrained.train()
    after = lora_weights(plain)
    step = plain.args.learning_rate * LAMBDA
    for name, weight in lora_weights(constrained).items():
        assert weight.dtype == gradients[name].dtype
        torch.testing.assert_close(after[name] - weight, step * gradients[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("accumulation", "loss_kwargs"), [(1, True), (4, True), (4, False)])
def test_one_sgd_step_adds_the_closed_form(pair, rows, direction, tmp_path, accumulation, loss_kwargs):
    options = {"micro": 2, "accumulation": accumulation, "loss_kwargs": loss_kwargs, "max_steps": 1}
    assert_differ_by_the_closed_form(pair, rows, direction, tmp_path, options)


def test_the_last_shorter_window_of_an_epoch(pair, rows, direction, tmp_path):
    """12 rows in micro-batches of 2, 4 to a step: the second step has 2 micro-batches and counts P once too."""
    options = {"micro": 2, "accumulation": 4, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 1e-3}
    results = []
    for lambda_reg in (0.0, LAMBDA):
        trainer = make_trainer(pair, rows[:12], tmp_path / str(lambda_reg), **options)
        if lambda_reg == 0.0:
            penalty = AlignmentPenalty(trainer.model, direction)
            start = float(penalty())
        attach(trainer, direction, lambda_reg)
        trainer.train()
        assert trainer.state.global_step == 2
        results.append(trainer)
    first, second = training_lines(results[1])
    # two steps of gradient descent on lambda P: both shrink it by about the same factor
    shrink = [first["asft/penalty"] / (LAMBDA * start), second["asft/penalty"] / first["asft/penalty"]]
    assert shrink[0] < 1
    assert math.log(shrink[1]) == pytest.approx(math.log(shrink[0]), rel=0.25)


def test_lambda_zero_is_no_constraint(pair, rows, direction, tmp_path):
    plain = make_trainer(pair, rows, tmp_path / "plain")
    plain.train()
    zero = make_trainer(pair, rows, tmp_path / "zero")
    attach(zero, direction, 0.0)
    zero.train()
    for name, weight in lora_weights(plain).items():
        assert torch.equal(weight, lora_weights(zero)[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_numbers(pair, rows, direction, tmp_path, accumulation):
    plain = make_trainer(pair, rows, tmp_path / "plain", accumulation=accumulation)
    plain.train()
    trainer = make_trainer(pair, rows, tmp_path / "asft", accumulation=accumulation)
    constraint = attach(trainer, direction, LAMBDA, projector="subspace")
    trainer.train()
    lines = training_lines(trainer)
    assert lines[0]["loss"] == pytest.approx(training_lines(plain)[0]["loss"], rel=1e-6), "the task's"
    assert len(lines) == 3
    last = lines[-1]
    assert last["asft/penalty"] == pytest.approx(LAMBDA * float(constraint.penalty()), rel=1e-4)
    report = constraint.report()
    assert last["asft/drift"] == pytest.approx(report.drift, rel=1e-4)
    assert last["asft/update_norm"] == pytest.approx(report.update_norm, rel=1e-4)
    assert trainer.state.log_history[-1]["asft/penalty_peak"] >= last["asft/penalty"]


def test_evaluation_is_left_alone(pair, rows, direction, tmp_path):
    plain, trainer = make_trainer(pair, rows, tmp_path / "a"), make_trainer(pair, rows, tmp_path / "b")
    attach(trainer, direction, LAMBDA)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    assert not [key for key in metrics if "asft" in key]


def test_checkpoints_are_stamped(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path, save_strategy="steps", save_steps=2)
    attach(trainer, direction, LAMBDA)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        stamp = json.loads((folder / "adapter_config.json").read_text())["asft"]
        assert stamp["direction_sha256"] == direction.sha256
        assert stamp["lambda_reg"] == LAMBDA


def test_a_model_that_is_made_anew_is_refused(pair, rows, direction, tmp_path):
    """The gradient would go to the one that was attached, and another would train."""
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.model_init = lambda: trainer.model
    with pytest.raises(AsftError, match="creates a new model when training starts"):
        attach(trainer, direction, LAMBDA)


def _another_adapter(model):
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("other")


def _the_head(model):
    model.get_base_model().lm_head.weight.requires_grad_(True)


def _one_frozen(model):
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    layer.lora_B["default"].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_adapter, "14 other weights train \\(first model.layers.0.self_attn.q_proj\\) than when"),
        (_the_head, "1 other weights train \\(first lm_head.weight\\) than when"),
        (_one_frozen, "LoRA layers no longer train than when"),
    ],
)
def test_what_trains_is_what_was_attached(pair, rows, direction, tmp_path, change, message):
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction, LAMBDA)
    change(trainer.model)
    with pytest.raises(AsftError, match=message):
        trainer.train()


def test_what_is_unfrozen_while_it_trains_is_noticed(pair, rows, direction, tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            _the_head(kwargs["model"])

    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction, LAMBDA)
    trainer.add_callback(Unfreeze())
    with pytest.raises(AsftError, match=r"first lm_head\.weight"):
        trainer.train()


def test_what_was_not_trained_under_it_bears_no_stamp(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction, LAMBDA)
    trainer.save_model()
    assert read_stamp(tmp_path) == {}
    trainer.train()
    trainer.save_model()
    assert read_stamp(tmp_path)["lambda_reg"] == LAMBDA


def test_an_adapter_that_learned_before_is_said(pair, rows, direction, tmp_path, caplog):
    trainer = make_trainer(pair, rows, tmp_path)  # its B is not zero
    attach(trainer, direction, LAMBDA)
    with caplog.at_level(logging.WARNING, "axolotl.asft"):
        trainer.train()
    assert "the adapter already holds an update of norm" in caplog.text


@pytest.mark.parametrize("lambda_reg", [-1.0, float("nan"), float("inf"), True])
def test_bad_lambda(pair, rows, direction, tmp_path, lambda_reg):
    with pytest.raises(AsftError, match="expected a finite number, 0 or more"):
        attach(make_trainer(pair, rows, tmp_path), direction, lambda_reg)


def test_attached_twice(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction)
    with pytest.raises(AsftError, match="already attached to this trainer"):
        attach(trainer, direction)


class OwnStep(Trainer):
    """A trainer that goes its own way to the loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
        return loss.detach()


def test_a_trainer_with_a_step_of_its_own(pair, rows, direction, tmp_path):
    """compute_loss is never called there; the penalty counts once all the same."""
    options = {"micro": 2, "accumulation": 4, "max_steps": 1, "cls": OwnStep}
    assert_differ_by_the_closed_form(pair, rows, direction, tmp_path, options)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, rows, direction, tmp_path, reentrant):
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_differ_by_the_closed_form(pair, rows, direction, tmp_path, {"accumulation": 2, "max_steps": 1, **changes})


def test_a_step_past_the_constraint_is_stopped(pair, rows, direction, tmp_path):
    """Something replaces the trainer's training_step after `attach` and goes around it."""
    trainer = make_trainer(pair, rows, tmp_path)
    before = lora_weights(trainer)
    attach(trainer, direction)
    trainer.training_step = types.MethodType(Trainer.training_step, trainer)
    with pytest.raises(AsftError, match="Trainer takes a step outside its training_step"):
        trainer.train()
    for name, weight in lora_weights(trainer).items():
        assert torch.equal(weight, before[name]), "not one unconstrained step"


def test_a_training_loop_past_the_constraint_is_noticed(pair, rows, direction, tmp_path):
    """A loop that neither calls training_step nor tells its callbacks of the steps it takes."""
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction)
    handler = trainer.callback_handler
    handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.state.global_step = 3
    with pytest.raises(AsftError, match="3 steps were trained, 0 of them constrained; do not use this adapter"):
        handler.on_train_end(trainer.args, trainer.state, trainer.control)


def test_an_optimizer_that_steps_in_the_backward_pass(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: None)
    with pytest.raises(AsftError, match="steps during the backward pass"):
        trainer.train()


@pytest.mark.parametrize("name", ["adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_known_to_step_in_the_backward_pass(pair, rows, direction, tmp_path, name):
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.args.optim = OptimizerNames(name)
    with pytest.raises(AsftError, match=f"optimizer {name} steps during the backward pass"):
        attach(trainer, direction)


def test_fp16_loss_scaling(pair, rows, direction, tmp_path):
    """The gradients are multiplied by the loss scale until the optimizer divides by it."""

    def with_scaler(trainer):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return trainer

    options = {"micro": 2, "accumulation": 2, "max_steps": 1, "max_grad_norm": 1e6}
    assert_differ_by_the_closed_form(pair, rows, direction, tmp_path, options, prepare=with_scaler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 LoRA", "bf16 LoRA"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
def test_precision(pair, rows, direction, tmp_path, dtype, base):
    """The penalty is computed in fp32 from the weights as they are, and added in their dtype."""

    def cast(trainer):
        for weight in trainer.model.parameters():
            weight.data = weight.data.to(dtype if weight.requires_grad else base)
        return trainer

    tolerance = {} if dtype == torch.float32 and base == torch.float32 else {"rtol": 0.02, "atol": 2e-3}
    options = {"max_steps": 1, "learning_rate": 0.1, "bf16": base != dtype}
    assert_differ_by_the_closed_form(pair, rows, direction, tmp_path, options, prepare=cast, **tolerance)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.FSDP, "FSDP1 is not supported by the constraint"),
        (DistributedType.MEGATRON_LM, "training under MEGATRON_LM is not supported by the constraint; use one device"),
    ],
)
def test_engines_that_are_refused(pair, rows, direction, tmp_path, monkeypatch, kind, message):
    trainer = make_trainer(pair, rows, tmp_path)
    state = trainer.accelerator.state
    before = state.distributed_type
    state.distributed_type = kind
    monkeypatch.setitem(state._shared_state, "fsdp_plugin", None)
    try:
        with pytest.raises(AsftError, match=message):
            attach(trainer, direction)
    finally:
        state.distributed_type = before


@pytest.mark.parametrize(("size", "key"), [("tp_size", "tensor_parallel_size"), ("cp_size", "context_parallel_size")])
def test_other_parallelism_is_refused(pair, rows, direction, tmp_path, monkeypatch, size, key):
    trainer = make_trainer(pair, rows, tmp_path)
    config = ParallelismConfig(**{size: 2})
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", property(lambda self: config))
    with pytest.raises(AsftError, match=f"{key} is not supported by the constraint"):
        attach(trainer, direction)


def test_nothing_of_the_penalty_is_kept_for_a_backward_pass(pair, rows, direction, tmp_path):
    """Activation offloading moves what the backward pass will need to the host: of the penalty there is nothing."""
    trainer = make_trainer(pair, rows, tmp_path)
    penalty = AlignmentPenalty(trainer.model, direction)

    def kept(tensor):
        raise AssertionError(f"a tensor of {tuple(tensor.shape)} was kept")

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        penalty.add_gradient(LAMBDA)
    assert all(weight.grad is not None for weight in trainer.model.parameters() if weight.requires_grad)


def test_resuming_gives_the_same_weights(pair, rows, direction, tmp_path):
    """Three steps, and two with one more from the checkpoint."""
    options = {"max_steps": 3, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(pair, rows, tmp_path / "whole", **options)
    attach(whole, direction, LAMBDA)
    whole.train()
    resumed = make_trainer(pair, rows, tmp_path / "resumed", **options)
    attach(resumed, direction, LAMBDA)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    for name, weight in lora_weights(whole).items():
        torch.testing.assert_close(lora_weights(resumed)[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "found"),
    [
        (None, "was trained without the constraint, and a run that continues from it would pass for a constrained one"),
        ({"lambda_reg": 1.0}, "was trained under lambda_reg 1.0, and this run asks for 20.0"),
        ({"lambda_reg": LAMBDA, "max_drift": 0.5}, "was trained under max_drift 0.5, and this run asks for None"),
        (
            {"lambda_reg": LAMBDA, "modules": ["q_proj"]},
            r"was trained under modules \['q_proj'\], and this run asks for",
        ),
    ],
)
def test_a_checkpoint_of_another_constraint_is_not_gone_on_from(pair, rows, direction, tmp_path, before, found):
    """What is saved says one thing of the whole run; the whole run has to have been so."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(pair, rows, tmp_path, **options | {"max_steps": 2})
    if before is not None:
        attach(first, direction, on_uncovered="ignore", **before)
    first.train()
    resumed = make_trainer(pair, rows, tmp_path, **options)
    attach(resumed, direction, LAMBDA)
    weights = (tmp_path / "checkpoint-2" / "adapter_config.json").read_text()
    with pytest.raises(AsftError, match=f"checkpoint-2 {found}"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").read_text() == weights


def test_a_checkpoint_in_pieces_says_what_it_was_trained_under(pair, rows, direction, tmp_path):
    """FSDP2's has no adapter that could bear a stamp, and may be moved."""
    trainer = make_trainer(pair, rows, tmp_path, save_strategy="steps", save_steps=2)
    constraint = attach(trainer, direction, LAMBDA, modules=("q_proj",), on_uncovered="ignore")
    settings = constraint.settings()
    assert settings["modules"] == ("q_proj",)

    def in_pieces(folder, *args, **kwargs):
        Path(folder).mkdir(parents=True)

    trainer.save_model = in_pieces
    trainer.train()
    assert not (tmp_path / "checkpoint-2" / "adapter_config.json").exists()
    assert peak_before(tmp_path / "checkpoint-2", []) == constraint.penalty_peak()
    moved = (tmp_path / "checkpoint-2").rename(tmp_path / "moved")
    refuse_other_constraint(moved, settings)
    with pytest.raises(AsftError, match="this run asks for 5"):
        refuse_other_constraint(moved, settings | {"lambda_reg": 5.0})
    (moved / STAMP_FILE).unlink()
    with pytest.raises(AsftError, match="without the constraint"):
        refuse_other_constraint(moved, settings)


def test_a_loop_without_events_is_no_constrained_training(pair, rows, direction, tmp_path):
    class Own(Trainer):
        def train(self, *args, **kwargs):
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            optimizer = torch.optim.SGD(weights, lr=1e-3)
            self.model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 4).long()).loss.backward()
            optimizer.step()

    trainer = make_trainer(pair, rows, tmp_path, cls=Own)
    constraint = attach(trainer, direction, LAMBDA)
    trainer.train()
    with pytest.raises(AsftError, match="Own does not call the callbacks of a transformers trainer, so"):
        constraint.trained()


def test_what_is_left_of_a_training_holds_no_model(pair, rows, direction, tmp_path):
    """Other plugins come after ours, and want the memory."""
    trainer = make_trainer(pair, rows, tmp_path)
    constraint = attach(trainer, direction, LAMBDA)
    trainer.train()
    trained, stamp = constraint.trained(), constraint.stamp()
    living = [weakref.ref(trainer), weakref.ref(trainer.model)]
    del trainer, constraint
    gc.collect()
    assert [alive() for alive in living] == [None, None]
    assert trained.stamp == stamp
    (tmp_path / "adapter_config.json").write_text("{}")
    trained.mark(tmp_path)
    assert read_stamp(tmp_path)["lambda_reg"] == LAMBDA


def test_training_twice(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    attach(trainer, direction, LAMBDA)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_peak_is_of_the_whole_run(pair, rows, direction, tmp_path):
    """Under a strong penalty the first step has the most of it."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(pair, rows, tmp_path / "whole", **options)
    attach(whole, direction, LAMBDA)
    whole.train()
    peak = whole.state.log_history[-1]["asft/penalty_peak"]
    assert peak > 1.01 * training_lines(whole)[0]["asft/penalty"], "it was before the first step"
    resumed = make_trainer(pair, rows, tmp_path / "resumed", **options)
    constraint = attach(resumed, direction, LAMBDA)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert constraint.stamp()["penalty_peak"] == peak
    assert resumed.state.log_history[-1]["asft/penalty_peak"] == peak


def test_the_peak_before_a_stop_is_known_without_a_log_line(pair, rows, direction, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    peaks = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(pair, rows, tmp_path, **options)
        constraint = attach(trainer, direction, LAMBDA)
        trainer.train(resume_from_checkpoint=start)
        peaks.append((constraint.stamp()["penalty_peak"], trainer.state.log_history[-2]["asft/penalty"]))
    assert peaks[0][0] > 1.01 * peaks[0][1], "it came before the one line of the log"
    assert peaks[1][0] == peaks[0][0]


def test_a_training_that_diverged_is_not_called_safe(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path, learning_rate=1e20)
    constraint = attach(trainer, direction, 0.1)
    trainer.train()
    keys = ("asft/penalty", "asft/drift", "asft/update_norm", "asft/max_drift")
    assert all(math.isnan(training_lines(trainer)[-1][key]) for key in keys)
    kept = read_history(tmp_path)
    assert [kept.lines[-1][key] for key in keys] == [None] * 4
    assert kept.snapshots()[-1]["layers"]["relative"] == [None] * 14
    (tmp_path / "README.md").write_text("# A model\n")
    trainer.save_model()
    stamp = json.loads((tmp_path / "adapter_config.json").read_text(), parse_constant=pytest.fail)["asft"]
    assert (stamp["drift"], stamp["update_norm"], stamp["penalty_peak"]) == (None, None, None)
    assert (stamp["lambda_reg"], stamp["max_drift"]) == (0.1, None)
    card = (tmp_path / "README.md").read_text()
    assert "the numbers at the end are not finite: the training diverged; do not use this adapter" in card
    assert "nan" not in card
    assert math.isnan(constraint.report().drift)


def test_early_stopping_and_the_best_model(pair, rows, direction, tmp_path):
    """The stamp is of the weights that are kept: the best, not the last."""
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.5}
    trainer = make_trainer(pair, rows, tmp_path, **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    constraint = attach(trainer, direction, 0.01)
    trainer.train()
    trainer.save_model()
    stamp = json.loads((tmp_path / "adapter_config.json").read_text())["asft"]
    assert stamp["update_norm"] == pytest.approx(constraint.report().update_norm, rel=1e-5)
    best = json.loads((Path(trainer.state.best_model_checkpoint) / "adapter_config.json").read_text())["asft"]
    assert stamp["update_norm"] == pytest.approx(best["update_norm"], rel=1e-5)


def _train_only(trainer, part):
    """As `unfrozen_parameters` leaves an adapter that begins at B = 0."""
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            weight.requires_grad_(part in name)
        if "lora_B" in name:
            weight.data.zero_()


@pytest.mark.parametrize("on_uncovered", ["error", "warn"])
def test_a_checkpoint_brings_what_another_part_learned(pair, rows, direction, tmp_path, caplog, on_uncovered):
    """The layers that train now are not those that trained before, and are frozen at what they learned."""
    first = make_trainer(pair, rows, tmp_path, save_strategy="steps", save_steps=3, save_only_model=True)
    _train_only(first, "layers.0")
    attach(first, direction, LAMBDA)
    first.train()
    second = make_trainer(pair, rows, tmp_path / "second", max_steps=4)
    _train_only(second, "layers.1")
    constraint = attach(second, direction, LAMBDA, on_uncovered=on_uncovered)
    assert constraint.settings()["uncovered"] == 0
    checkpoint = str(tmp_path / "checkpoint-3")
    text = "7 LoRA layers do not train but still change the model"
    if on_uncovered == "error":
        with pytest.raises(AsftError, match=text):
            second.train(resume_from_checkpoint=checkpoint)
        return
    second.train(resume_from_checkpoint=checkpoint)
    assert text in caplog.text
    second.save_model()
    assert read_stamp(tmp_path / "second")["uncovered"] == 7


@pytest.mark.parametrize("strength", [{"lambda_reg": LAMBDA}, {"max_drift": 0.5}, {"lambda_reg": 0}])
def test_a_hook_that_keeps_rows_frozen_is_refused(pair, rows, direction, tmp_path, strength):
    """axolotl freezes a slice of `unfrozen_parameters` by a hook, which a gradient that is added later would pass."""
    from axolotl.utils.freeze import freeze_layers_except

    trainer = make_trainer(pair, rows, tmp_path)
    freeze_layers_except(trainer.model, [r"[a-zA-Z_0-9.]+lora_A[a-z.]+$[0:2]", r"[a-zA-Z_0-9.]+lora_B"])
    attach(trainer, direction, **strength)
    if strength == {"lambda_reg": 0}:
        trainer.train()
        return
    with pytest.raises(AsftError, match="a hook changes the gradient of its LoRA factors"):
        trainer.train()


def test_what_is_no_trainer_or_no_direction(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    for given, message in (
        ((trainer, "d.safetensors"), "direction is a str; expected AlignmentDirection.load"),
        ((trainer.model, direction), "attach was given a .*; expected a transformers or TRL trainer first"),
        ((direction, trainer), "attach was given a AlignmentDirection"),
    ):
        with pytest.raises(AsftError, match=message):
            attach(*given)
    with pytest.raises(AsftError, match="lambda_reg is '1'; expected a finite number, 0 or more"):
        attach(trainer, direction, lambda_reg="1")
    with pytest.raises(AsftError, match="attach knows no projectr; did you mean projector"):
        attach(trainer, direction, projectr="paper")
