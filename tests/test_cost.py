"""What the constraint costs, counted: these numbers change on purpose only. benchmarks/step_overhead.py times it."""

import copy

import pytest
import torch
from trainers import make_trainer

from axolotl_asft import AlignmentPenalty, attach, cost, layer_groups
from axolotl_asft.direction import AlignmentDirection
from benchmarks import counting, shapes

SMALL = shapes.Shape(hidden=64, key_value=32, mlp=128, layers=3, heads=4)


def count(function) -> counting.Counter:
    with counting.Counter() as counted:
        function()
    return counted


def penalty_of(shape: shapes.Shape = SMALL, layers: int = 3, **options) -> AlignmentPenalty:
    model = shapes.lora_model(shape.config(layers), 4)
    sketch = options.pop("sketch", 0)
    return AlignmentPenalty(model, shapes.random_direction(model, 8, sketch), verify_model=False, **options)


@pytest.mark.parametrize(
    ("sketch", "launches", "allocated"), [(0, 103, 320_000), (16, 95, 400_000)], ids=["weights", "fisher"]
)
def test_one_penalty_call(sketch, launches, allocated):
    """21 layers of 4 shapes. Take the new numbers over when you mean them; the second is in bytes, rounded up."""
    counted = count(penalty_of(sketch=sketch).add_gradient)
    assert counted.launches == launches
    assert 0.9 * allocated < counted.allocated <= allocated
    assert not counted.waits


def test_more_layers_are_no_more_launches():
    few, many = (count(penalty_of(layers=layers).add_gradient).launches for layers in (2, 12))
    assert many == few


def test_temporaries_do_not_grow_with_the_layers(monkeypatch):
    """The layers of a large model are taken in turns."""
    monkeypatch.setattr(layer_groups, "TEMPORARY_BYTES", 60_000)
    peaks = [count(penalty_of(layers=layers).add_gradient).peak for layers in (4, 16)]
    assert peaks[1] < 1.2 * peaks[0]
    assert max(peaks) < 60_000


@pytest.mark.parametrize("name", ["7B", "70B"])
def test_temporaries_at_the_shapes_of_large_models(name):
    """Under 32 MB: one decoder layer of the shape."""
    penalty = shapes.random_penalty(shapes.SHAPES[name], layers=1, r=16, k=64)
    counted = count(penalty.add_gradient)
    assert 8e6 < counted.peak < 32e6
    stored = shapes.stored_bytes(penalty) * shapes.SHAPES[name].layers
    assert stored < {"7B": 180e6, "70B": 900e6}[name]


def test_groups_of_any_size_agree(monkeypatch):
    """Value, gradients and numbers of the log, with layers together and one by one."""
    together = penalty_of(sketch=16)
    monkeypatch.setattr(layer_groups, "TEMPORARY_BYTES", 1)
    alone = penalty_of(sketch=16)
    assert max(len(group.found) for group in alone.groups) == 1 < min(len(group.found) for group in together.groups)
    assert float(together.add_gradient(2.0)) == pytest.approx(float(alone.add_gradient(2.0)), rel=1e-5)
    for one, other in zip(together.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.A.grad, other.A.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one.B.grad, other.B.grad, rtol=1e-4, atol=1e-7)
    for one, other in zip(together.measure(), alone.measure(), strict=True):
        assert one.name == other.name
        assert one.penalty == pytest.approx(other.penalty, rel=1e-4)
    assert float(together.shorten(1e-3)) == pytest.approx(float(alone.shorten(1e-3)), rel=1e-4)
    for one, other in zip(together.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.B, other.B, rtol=1e-4, atol=1e-7)


def test_layers_that_keep_different_numbers_of_directions():
    """Filled up with zeros to one width: the same as each with its own."""
    model = shapes.lora_model(SMALL.config(3), 4)
    direction = shapes.random_direction(model, 8)
    ragged = copy.copy(direction.modules)
    for i, (name, module) in enumerate(ragged.items()):
        k = 1 + i % 8
        ragged[name] = type(module)(module.U[:, :k], module.S[:k], module.norm, module.in_features)
    direction = AlignmentDirection(modules=ragged, spec=direction.spec)
    penalty = AlignmentPenalty(model, direction, projector="subspace", verify_model=False)
    expected = 0.0
    for layer in penalty.layers:
        U = ragged[layer.name].U.double()
        update = layer.scaling * layer.B.detach().double() @ layer.A.detach().double()
        expected += float((update - U @ (U.T @ update)).square().sum())
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-5)
    assert sum(layer.orthogonal for layer in penalty.measure()) == pytest.approx(expected, rel=1e-5)


def test_nothing_is_saved_hooked_or_waited_for(pair, rows, direction_file, tmp_path):
    """The model's state, its modules and its evaluation are what they were; a step reads no number back."""
    trainer = make_trainer(pair, rows, tmp_path, max_steps=4, logging_steps=100)
    state = set(trainer.model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.model.modules()]
    way = trainer.compute_loss, trainer.prediction_step, trainer.evaluate
    constraint = attach(trainer, AlignmentDirection.load(direction_file), 1.0)
    assert set(trainer.model.state_dict()) == state
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()] == hooks
    assert (trainer.compute_loss, trainer.prediction_step, trainer.evaluate) == way
    waits = []
    add_penalty = constraint.gradient._add_penalty

    def counted():
        with counting.Counter() as counter:
            add_penalty()
        waits.append(counter.waits)

    constraint.gradient._add_penalty = counted
    trainer.train()
    assert waits == [[], [], [], []]


def test_the_counter_counts():
    a = torch.randn(10, 10)

    def work():
        for _ in range(3):
            b = (a @ a) + 1
            del b
        c = a * 2
        c.add_(1)
        float(c.T[0, 0])

    counted = count(work)
    assert (counted.launches, counted.allocated, counted.peak) == (3 * 2 + 2, (3 * 2 + 1) * 400, 800)
    assert counted.waits == ["aten::_local_scalar_dense"]


def test_where_there_is_a_gpu_more_layers_are_taken_at_a_time(monkeypatch):
    """By the machine, so that all processes of a run make the same groups, wherever their weights are at first."""
    few = shapes.random_penalty(shapes.SHAPES["SmolLM2-135M"], 30, 16, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    many = shapes.random_penalty(shapes.SHAPES["SmolLM2-135M"], 30, 16, 64)
    assert 4 <= len(many.groups) < len(few.groups)
    most = max(group.bytes_at_work for group in many.groups)
    assert most <= layer_groups.TEMPORARY_BYTES_ON_GPU
    foreseen = cost.estimate(few.groups, parameters=1, tokens=1, checkpointing=False).temporary
    assert foreseen == pytest.approx(most, rel=0.1), "what `check` says, without a GPU"
    monkeypatch.undo()
    assert layer_groups.may_take() == layer_groups.TEMPORARY_BYTES
