"""An adapter that a handler of Ctrl-C saves, as axolotl's does, says that it was trained under the constraint."""

import gc
import json
import os
import signal
import sys
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from trainers import make_trainer
from transformers import TrainerCallback

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.interruption import StampOnInterrupt


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


@pytest.fixture(autouse=True)
def handler_of_the_tests():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class At(TrainerCallback):
    """Ctrl-C at a moment of the training."""

    def __init__(self, moment, step):
        self.step = step
        setattr(self, moment, self.interrupt)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def save_and_exit(model, folder):
    """What axolotl does at a Ctrl-C."""

    def handle(number, frame):
        model.save_pretrained(folder)
        sys.exit(0)

    return handle


def interrupted(trainer, direction, moment, step, **options):
    """Train until the Ctrl-C; returns the constraint."""
    held = []
    trainer.add_callback(StampOnInterrupt(lambda: held[0] if held else None))
    held.append(attach(trainer, direction, **options))
    trainer.add_callback(At(moment, step))
    signal.signal(signal.SIGINT, save_and_exit(trainer.model, trainer.args.output_dir))
    with pytest.raises(SystemExit):
        trainer.train()
    return held[0]


def stamp(folder):
    return json.loads((folder / "adapter_config.json").read_text()).get("asft")


@pytest.mark.parametrize(
    ("moment", "step"), [("on_train_begin", 0), ("on_step_begin", 1), ("on_pre_optimizer_step", 1), ("on_step_end", 2)]
)
def test_stamped_at_any_moment(pair, rows, direction, tmp_path, moment, step):
    interrupted(make_trainer(pair, rows, tmp_path), direction, moment, step, lambda_reg=2.0)
    found = stamp(tmp_path)
    assert found["interrupted_at"] == [step, 3]
    assert found["lambda_reg"] == 2
    assert found["direction_sha256"] == direction.sha256
    assert "drift" not in found
    assert f"interrupted after {step} of 3 steps" in (tmp_path / "README.md").read_text()


def test_after_the_end_it_is_not_interrupted(pair, rows, direction, tmp_path):
    constraint = interrupted(make_trainer(pair, rows, tmp_path), direction, "on_train_end", 3, lambda_reg=2.0)
    assert "interrupted_at" not in stamp(tmp_path)
    assert stamp(tmp_path)["drift"] == constraint.stamp()["drift"]


def test_the_budget_holds_in_what_is_saved(pair, rows, direction, tmp_path):
    """After the optimizer's step and before the budget's turn; the step of Adam is far past the budget."""
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.add_callback(At("on_optimizer_step", 0))  # of the callbacks the first
    held = []
    trainer.add_callback(StampOnInterrupt(lambda: held[0]))
    held.append(attach(trainer, direction, max_drift=1e-3))
    signal.signal(signal.SIGINT, save_and_exit(trainer.model, tmp_path))
    with pytest.raises(SystemExit):
        trainer.train()
    assert 0 < held[0].report().max_drift <= 1e-3 * (1 + 1e-4)


def test_a_handler_that_saves_nothing_or_fails_marks_nothing(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path)
    constraint = attach(trainer, direction)
    trainer.model.save_pretrained(tmp_path)  # an earlier run's
    callback = StampOnInterrupt(lambda: constraint)

    def fails(number, frame):
        raise OSError("no space left")

    no_space = pytest.raises(OSError, match="no space left")
    for handler, expected in ((fails, no_space), (lambda number, frame: None, nullcontext())):
        signal.signal(signal.SIGINT, handler)
        callback.on_train_begin(None, None, None)
        with expected:
            signal.raise_signal(signal.SIGINT)
        assert stamp(tmp_path) is None


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_other_handlers_are_left_alone(handler):
    signal.signal(signal.SIGINT, handler)
    StampOnInterrupt(lambda: None).on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_thread_has_no_handlers():
    signal.signal(signal.SIGINT, ours := lambda number, frame: None)
    thread = threading.Thread(target=StampOnInterrupt(lambda: None).on_train_begin, args=(None, None, None))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is ours


def test_a_forked_worker_marks_nothing(tmp_path):
    marked = tmp_path / "marked"
    constraint = SimpleNamespace(before_interruption=marked.touch, mark_interrupted=marked.touch)
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(7))
    StampOnInterrupt(lambda: constraint).on_train_begin(None, None, None)
    child = os.fork()
    if child == 0:
        try:
            signal.raise_signal(signal.SIGINT)
        except SystemExit as end:
            os._exit(end.code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not marked.exists()


def test_the_handler_that_stays_holds_no_model(pair, rows, direction, tmp_path):
    """The next run of a sweep may be of the same process."""
    trainer = make_trainer(pair, rows, tmp_path)
    constraint = attach(trainer, direction)
    known, model = weakref.ref(constraint), weakref.ref(trainer.model)
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
    StampOnInterrupt(known).on_train_begin(None, None, None)
    del trainer, constraint
    gc.collect()
    assert known() is None
    assert model() is None
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
