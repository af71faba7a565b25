"""The history of a run: what is written at each log line, how it goes on after a stop, and what is refused."""

import itertools
import json
import logging
from pathlib import Path

import pytest
from trainers import make_trainer

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach
from axolotl_asft.diagnostics import DriftReport
from axolotl_asft.errors import AsftError
from axolotl_asft.history import HISTORY_FILE, REPORT, SNAPSHOTS, HistoryWriter, read_history
from axolotl_asft.penalty import LayerDrift
from axolotl_asft.report.write import REPORT_FILE
from axolotl_asft.stamp import PICTURE

LAYERS = [f"model.layers.{i}.mlp.up_proj" for i in range(40)]


@pytest.fixture(scope="module")
def direction(direction_file):
    return AlignmentDirection.load(direction_file)


def drift(size: float, layers=LAYERS) -> DriftReport:
    return DriftReport(tuple(LayerDrift(name, size, 4 * size, size, 0.123456789 * size) for name in layers))


def written(folder: Path, steps: int, layers=LAYERS, start: int = 0) -> HistoryWriter:
    writer = HistoryWriter(layers)
    writer.begin(folder, start, steps, [])
    for step in range(start + 1, steps + 1):
        writer.add(step, step / 10, {"loss": 1 / step, "memory/max": 3.0}, drift(step, layers), last=False)
    return writer


def lines_of(folder: Path) -> list[str]:
    return (folder / HISTORY_FILE).read_text().splitlines()


def test_each_log_line_is_kept_and_measured_once(pair, rows, direction, tmp_path, monkeypatch):
    calls = []
    measure = AlignmentPenalty.measure
    monkeypatch.setattr(AlignmentPenalty, "measure", lambda self: calls.append(1) or measure(self))
    trainer = make_trainer(pair, rows, tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4)
    constraint = attach(trainer, direction, 20.0)
    trainer.train()
    history = read_history(tmp_path)
    assert len(calls) == 1 + 2 + 1 + 1, "where it starts, two log lines, the last one, and the stamp"
    logged = [line for line in trainer.state.log_history if set(line) & {"loss", "eval_loss", "train_loss"}]
    assert len(history.lines) == len(logged) == 4
    for ours, theirs in zip(history.lines, logged, strict=True):
        for key in ("step", "loss", "eval_loss", "learning_rate", "asft/penalty", "asft/drift", "asft/penalty_peak"):
            assert ours.get(key) == (pytest.approx(theirs[key], rel=1e-5) if key in theirs else None), key
    last = history.snapshots()[-1]["layers"]
    assert history.layers == [layer.name for layer in constraint.penalty.layers]
    for i, layer in enumerate(measure(constraint.penalty)):
        assert last["relative"][i] == pytest.approx(layer.relative, rel=1e-3)
        assert last["drift"][i] == pytest.approx(layer.drift, rel=1e-3)
        assert last["norm"][i] == pytest.approx(layer.total**0.5, rel=1e-3)
    assert history.header["constraint"]["direction_sha256"] == direction.sha256
    assert history.header["versions"]["torch"]


def test_lambda_zero_is_recorded_too(pair, rows, direction, tmp_path):
    trainer = make_trainer(pair, rows, tmp_path, max_steps=2)
    attach(trainer, direction, 0.0)
    trainer.train()
    history = read_history(tmp_path)
    assert [line["asft/penalty"] for line in history.lines] == [0, 0, 0]
    assert history.lines[-1]["asft/update_norm"] > 0


def test_a_long_run_keeps_every_line_and_some_snapshots(tmp_path):
    written(tmp_path, 5000)
    history = read_history(tmp_path)
    assert [line["step"] for line in history.lines] == list(range(1, 5001))
    steps = [line["step"] for line in history.snapshots()]
    assert 0.9 * SNAPSHOTS <= len(steps) <= SNAPSHOTS
    assert steps[0] == 1
    assert max(b - a for a, b in itertools.pairwise(steps)) == 25
    assert (tmp_path / HISTORY_FILE).stat().st_size < 1e6
    assert "memory/max" not in history.lines[0]


def test_the_last_line_has_the_layers_whatever_was_thinned(tmp_path):
    writer = written(tmp_path, 999)
    writer.add(999, 1.0, {"train_loss": 0.5}, drift(999), last=True)
    history = read_history(tmp_path)
    assert history.snapshots()[-1]["step"] == 999
    assert history.lines[-1]["train_loss"] == 0.5


def test_a_resumed_run_goes_on(pair, rows, direction, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer(pair, rows, tmp_path, max_steps=3, **options)
    attach(first, direction, 20.0)
    first.train()
    before = lines_of(tmp_path)
    resumed = make_trainer(pair, rows, tmp_path, max_steps=5, **options)
    attach(resumed, direction, 20.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    history = read_history(tmp_path)
    assert [line["step"] for line in history.lines] == [1, 2, 3, 4, 5, 5]
    assert lines_of(tmp_path)[1:3] == before[1:3]
    assert history.header["resumed_at_steps"] == [2]
    elsewhere = make_trainer(pair, rows, tmp_path / "elsewhere", max_steps=5, **options)
    attach(elsewhere, direction, 20.0)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    there = read_history(tmp_path / "elsewhere")
    assert [line["step"] for line in there.lines] == [1, 2, 3, 4, 5, 5]
    assert [line["asft/penalty"] for line in there.lines] == [line["asft/penalty"] for line in history.lines]
    assert [line["step"] for line in there.snapshots()] == [3, 4, 5]


def test_training_anew_begins_anew(tmp_path):
    written(tmp_path, 9)
    written(tmp_path, 3)
    history = read_history(tmp_path)
    assert [line["step"] for line in history.lines] == [1, 2, 3]
    assert "resumed_at_steps" not in history.header


def test_training_anew_takes_the_earlier_report_away(tmp_path):
    """A picture that lies there goes into the model card."""
    assert {REPORT_FILE, PICTURE} < set(REPORT)
    reports = [tmp_path / name for name in REPORT]
    for name in ("mine.html", "asft_report_mine.png"):
        (tmp_path / name).write_text("")
    for path in reports:
        path.write_text("of an earlier run")
    written(tmp_path, 3, start=1)
    assert all(path.is_file() for path in reports), "a resumed run is the same"
    written(tmp_path, 3)
    assert not any(path.exists() for path in reports)
    assert (tmp_path / "mine.html").is_file()
    assert (tmp_path / "asft_report_mine.png").is_file()


def test_a_cut_last_line_is_left_out_and_then_replaced(tmp_path):
    written(tmp_path, 5)
    path = tmp_path / HISTORY_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert [line["step"] for line in read_history(tmp_path).lines] == [1, 2, 3, 4]
    written(tmp_path, 6, start=4)
    assert [line["step"] for line in read_history(tmp_path).lines] == [1, 2, 3, 4, 5, 6]


def test_a_history_of_other_layers_is_not_continued(tmp_path, caplog):
    written(tmp_path, 5)
    with caplog.at_level(logging.WARNING, "axolotl.asft"):
        written(tmp_path, 6, layers=LAYERS[:3], start=4)
    assert "other layers" in caplog.text
    assert [line["step"] for line in read_history(tmp_path).lines] == [5, 6]


def test_what_is_not_finite_is_null(tmp_path):
    writer = written(tmp_path, 1)
    writer.add(2, None, {"loss": float("nan"), "grad_norm": float("inf")}, drift(float("nan")), last=True)
    line = read_history(tmp_path).lines[-1]
    assert (line["loss"], line["grad_norm"], line["epoch"]) == (None, None, None)
    assert line["layers"]["norm"] == [None] * 40


def test_a_disk_that_refuses_costs_a_warning(tmp_path, caplog):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, "axolotl.asft"):
        writer = written(blocked, 3)
    assert caplog.text.count("the history of the run is not saved") == 1
    assert not writer.is_kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "not a run history"),
        (lambda lines: ["{}", *lines[1:]], "its first line does not say 'asft-history'"),
        (lambda lines: [lines[0].replace('"format_version": 1', '"format_version": 7'), *lines[1:]], "version 7"),
        (lambda lines: [lines[0].replace('"layers": [', '"layers": [3, '), *lines[1:]], "names no layers"),
        (lambda lines: [*lines[:2], lines[2][:-30], *lines[3:]], "line 3 is not valid JSON"),
        (lambda lines: [*lines, "[1, 2]"], "line 7 is not a JSON object"),
        (lambda lines: [*lines, '{"loss": 1}'], "line 7 is not in the expected form"),
        (lambda lines: [*lines, '{"step": -1}'], "line 7 is not in the expected form"),
        (lambda lines: [*lines, '{"step": 9, "loss": "<b>"}'], "line 7 is not in the expected form"),
        (lambda lines: [*lines, '{"step": 9, "loss": NaN}'], "line 7 is not in the expected form"),
        (lambda lines: [*lines, '{"step": 9, "layers": {"relative": [1]}}'], "line 7 is not in the expected form"),
        (lambda lines: [*lines, "[" * 100000], "line 7 is not valid JSON"),
        (lambda lines: [*lines[:5], lines[5].replace('"norm": [', '"norm": [-')], "line 6 is not"),
        (lambda lines: [*lines, '{"step": 1' + "0" * 400 + "}"], "line 7 is not in the expected form"),
        (lambda lines: [lines[0][:-1] + ', "versions": [1]}', *lines[1:]], "first line is not in the expected form"),
        (lambda lines: [lines[0][:-1] + ', "config": "<b>"}', *lines[1:]], "first line is not in the expected form"),
        (lambda lines: [lines[0][:-1] + ', "resumed_at_steps": ["<b>"]}', *lines[1:]], "first line is not in the"),
    ],
)
def test_a_damaged_history_is_one_line(tmp_path, change, message):
    written(tmp_path, 5)
    (tmp_path / HISTORY_FILE).write_text("".join(f"{line}\n" for line in change(lines_of(tmp_path))))
    with pytest.raises(AsftError, match=message) as caught:
        read_history(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_history_and_no_text(tmp_path):
    with pytest.raises(AsftError, match="give the output_dir of a run"):
        read_history(tmp_path)
    (tmp_path / HISTORY_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AsftError, match="cannot be read"):
        read_history(tmp_path)


def test_secrets_of_the_config_are_not_written(tmp_path):
    writer = HistoryWriter(LAYERS)
    writer.header["config"] = {"hub_token": "hf_abcdefghijklmnopqrst", "lora_r": 8}
    writer.begin(tmp_path, 0, 1, [])
    assert "abcdefgh" not in (tmp_path / HISTORY_FILE).read_text()
    assert json.loads(lines_of(tmp_path)[0])["config"] == {"hub_token": "[redacted]", "lora_r": 8}


def test_numbers_that_json_does_not_know(tmp_path):
    """`max_grad_norm: .inf` is the usual way to log the norm of the gradient without clipping it."""
    writer = HistoryWriter(LAYERS)
    writer.header["config"] = {"max_grad_norm": float("inf"), "folder": tmp_path, "rates": [0.1, float("nan")]}
    writer.begin(tmp_path, 0, 4, [])
    config = read_history(tmp_path).header["config"]
    assert config == {"max_grad_norm": "Infinity", "folder": str(tmp_path), "rates": [0.1, "NaN"]}
