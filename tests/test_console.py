"""What the commands share at the terminal: one line and an exit status for each kind of failure."""

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

from axolotl_asft.console import OneLineErrors, stages
from axolotl_asft.errors import AsftError, WorkFailed, did_you_mean, one_line

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def write_to_a_full_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("something")


def fail_with(error: Exception):
    def work() -> None:
        raise error

    return work


def run(work):
    group = OneLineErrors("asft", commands={"work": click.Command("work", callback=work)})
    return CliRunner().invoke(group, ["work"])


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (fail_with(AsftError("rank is 0; expected 1 or more")), 2, "asft: rank is 0; expected 1 or more"),
        (fail_with(WorkFailed("the Hub failed; try again")), 1, "asft: the Hub failed; try again"),
        (write_to_a_full_disk, 1, "asft: [Errno 28] No space left on device; make room"),
        (fail_with(FULL), 1, "asft: Error while serializing: I/O error: No space left on device (os error 28); make"),
        (fail_with(torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")), 1, "asft: CUDA out of memory. Tried"),
    ],
)
def test_each_failure_is_one_line_with_its_exit_status(work, status, line):
    result = run(work)
    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (status, 1, "")
    assert result.stderr.startswith(line)


def test_a_mistake_of_ours_keeps_its_traceback():
    mistake = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert run(fail_with(mistake)).exception is mistake


def test_click_keeps_its_own_errors():
    result = run(fail_with(click.BadParameter("no such thing")))
    assert (result.exit_code, "no such thing" in result.stderr) == (2, True)


def test_errors_of_others_are_put_in_a_line():
    assert one_line(ValueError("several\n  lines,\tone")) == "several lines, one"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert len(one_line(ValueError("x" * 1000))) == 300


def test_a_suggestion_is_near_or_not_made():
    assert did_you_mean("lamda", ["rank", "lambda"]) == "did you mean lambda?"
    assert did_you_mean("nothing", iter(["rank", "lambda"]), "see the list") == "see the list"


def test_each_stage_moves_its_own_bar(monkeypatch):
    moved = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("rich.progress.Progress.advance", lambda self, task, done: moved.append((int(task), done)))
    with stages(show=True) as stage:
        first, second = stage("first", 3), stage("second", 3)
        first(2)
        second()
    assert moved == [(0, 2), (1, 1)]


def test_a_long_error_of_a_library_ends_at_a_word():
    found = one_line(RuntimeError("a line\n" + "word " * 100))
    assert found.startswith("a line word")
    assert found.endswith("word ...")
    assert len(found) <= 300
    assert one_line(RuntimeError("x" * 500)) == "x" * 300
    assert one_line(RuntimeError()) == "RuntimeError"
