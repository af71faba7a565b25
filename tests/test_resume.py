"""An extraction that is killed goes on where it stopped, and ends in the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import copied, write_wide_checkpoint
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import child_environment, interruptible, make_pair

from axolotl_asft import AlignmentDirection, extract_direction
from axolotl_asft.cli import asft
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.prompts import Prompt, load_prompts
from axolotl_asft.partial import Parts
from axolotl_asft.sources import open_source

READY = """
import sys
from axolotl_asft.extract import extract_direction
print("ready", flush=True)
extract_direction(sys.argv[1], sys.argv[2], rank=8, output=sys.argv[3])
"""
ROOT = str(Path(__file__).parents[1])
COMMAND = [sys.executable, "-m", "axolotl_asft", "extract"]


def but_for_the_time(file: Path) -> bytes:
    return re.sub(rb'created\\\\*": \\\\*"[^"]*"', b"", file.read_bytes())


def parts(output: Path) -> dict[str, int]:
    """Finished layers by file, with the time that they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{output}.partial").glob("0*.safetensors")}


def environment() -> dict[str, str]:
    """One thread: more of them add in another order, which the last bit of a factor shows."""
    return child_environment(PYTHONPATH=ROOT, OMP_NUM_THREADS="1")


def started(pair, output) -> subprocess.Popen:
    arguments = ["--base", str(pair[0]), "--aligned", str(pair[1]), "--rank", "8", "-o", str(output)]
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """12 layers of 400 x 400: a while of work each."""
    folder = tmp_path_factory.mktemp("wide")
    return [write_wide_checkpoint(folder / name, 12, seed, 400) for seed, name in enumerate(("base", "aligned"))]


@pytest.fixture(scope="module")
def whole(wide, tmp_path_factory):
    """Their direction by the command, uninterrupted."""
    output = tmp_path_factory.mktemp("whole") / "d.safetensors"
    started(wide, output).communicate(timeout=60)
    return output


def test_killed_in_every_way(wide, whole, tmp_path):
    output = tmp_path / "d.safetensors"
    seen: dict[str, int] = {}
    for way, after in ((signal.SIGKILL, 2), (signal.SIGTERM, 4), (signal.SIGINT, 6)):
        process = started(wide, output)
        while len(parts(output)) < after:
            time.sleep(0.002)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(way)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (1 if way == signal.SIGINT else -way)
        assert not output.exists()
        assert ("the same command resumes there" in errors) == (way == signal.SIGINT)
        if seen:
            assert f"resuming in {output}.partial: {len(seen)} of 12 layers are done" in errors
        kept = parts(output)
        assert seen.items() <= kept.items(), "what was finished is not made again"
        seen = kept
    assert len(seen) < 12
    _, errors = started(wide, output).communicate(timeout=60)
    assert but_for_the_time(output) == but_for_the_time(whole)
    assert not Path(f"{output}.partial").exists()
    assert f"{len(seen)} of 12 layers are done" in errors


@pytest.mark.slow
def test_killed_at_random(wide, whole, tmp_path):
    """Whatever it was doing: reading, decomposing, writing, renaming, removing the work folder."""
    output = tmp_path / "d.safetensors"
    generator = random.Random(0)
    kills = 0
    while not output.exists():
        command = [sys.executable, "-c", READY, *map(str, wide), str(output)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        assert kills < 20
        for path in Path(f"{output}.partial").glob("0*.safetensors"):
            AlignmentDirection.load(path)
    assert kills >= 2
    assert but_for_the_time(output) == but_for_the_time(whole)


def interrupted(pair, output, monkeypatch, after=5, **options):
    """An extraction that stops after some layers, in this process."""
    keep, done = Parts.keep, []

    def stopping(self, name, part):
        if len(done) == after:
            raise KeyboardInterrupt
        keep(self, name, part)
        done.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract_direction(*pair, output=output, **options)
    assert len(parts(output)) == after


def test_other_settings_start_afresh(pair, tmp_path, monkeypatch, caplog):
    output = tmp_path / "d.safetensors"
    interrupted(pair, output, monkeypatch, rank=4)
    direction = extract_direction(*pair, rank=5, output=output)
    assert caplog.messages == [f"{output}.partial is from an extraction that differs in rank; starting afresh"]
    extract_direction(*pair, rank=5).save(tmp_path / "whole.safetensors")
    assert but_for_the_time(output) == but_for_the_time(tmp_path / "whole.safetensors")
    assert direction.sha256


def test_other_modules_start_afresh(pair, tmp_path, monkeypatch, caplog):
    output = tmp_path / "d.safetensors"
    interrupted(pair, output, monkeypatch, rank=4)
    extract_direction(*pair, rank=4, output=output, modules=["layers.0.mlp"])
    assert caplog.messages == [f"{output}.partial is from an extraction that differs in modules; starting afresh"]


@pytest.mark.parametrize("changed", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_other_weights_are_seen(pair, tmp_path, monkeypatch, caplog, changed):
    """Under the same name, with the same header: what was made from the old ones is not used."""
    aligned = copied(pair[1], tmp_path / "aligned")
    output = tmp_path / "d.safetensors"
    interrupted((pair[0], aligned), output, monkeypatch, rank=4, after=10)
    tensors = load_file(aligned / "model.safetensors")
    tensors[changed] += 0.001
    save_file(tensors, aligned / "model.safetensors")
    extract_direction(pair[0], aligned, rank=4, output=output)
    assert any("the weights are not those of" in message for message in caplog.messages) == ("layers.0" in changed)
    extract_direction(pair[0], aligned, rank=4).save(tmp_path / "whole.safetensors")
    assert but_for_the_time(output) == but_for_the_time(tmp_path / "whole.safetensors")


def test_a_damaged_part_is_made_again(pair, tmp_path, monkeypatch):
    output = tmp_path / "d.safetensors"
    interrupted(pair, output, monkeypatch, rank=4)
    first = Path(f"{output}.partial") / "00000.safetensors"
    first.write_bytes(first.read_bytes()[:-7])
    extract_direction(*pair, rank=4, output=output)
    extract_direction(*pair, rank=4).save(tmp_path / "whole.safetensors")
    assert but_for_the_time(output) == but_for_the_time(tmp_path / "whole.safetensors")


def test_a_folder_of_somebody_elses_is_left_alone(pair, tmp_path):
    output = tmp_path / "d.safetensors"
    theirs = Path(f"{output}.partial") / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(AsftError, match=r"is needed for what is finished, and holds thesis\.txt"):
        extract_direction(*pair, output=output)
    assert theirs.read_text() == "mine"


def test_one_process_at_a_time(pair, tmp_path):
    output = tmp_path / "d.safetensors"
    with Parts.open(output, []):
        second = started(pair, output)
        _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert errors == f"asft: another extraction is running in {output}.partial; wait for it, or give another --output\n"
    third = started(pair, output)
    third.communicate(timeout=60)
    assert third.returncode == 0


def test_killed_before_it_had_begun(pair, tmp_path):
    """What kill -9 may leave of a folder with nothing finished in it."""
    folder = tmp_path / "d.safetensors.partial"
    folder.mkdir()
    (folder / ".extraction.json.abc.tmp").write_text("{")
    (folder / ".00000.safetensors.abc.tmp").write_bytes(b"cut")
    (folder / "extraction.json").write_text("[" * 100_000)
    extract_direction(*pair, rank=4, output=tmp_path / "d.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_nothing_is_left_of_a_pair_without_a_difference(pair, tmp_path):
    with pytest.raises(AsftError, match="have the same weights"):
        extract_direction(pair[1], pair[1], output=tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_metrics_and_right_vectors_survive(tmp_path, monkeypatch):
    import torch

    from axolotl_asft.metrics import LayerMetric, ModelMetric

    pair = make_pair(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    layer = LayerMetric(torch.randn(64, 3, generator=generator), None, 0.9)
    metric = ModelMetric("activations", {name: layer}, answers=5)
    options = {"rank": 4, "keep_v": True, "metrics": [metric]}
    output = tmp_path / "d.safetensors"
    interrupted(pair, output, monkeypatch, after=6, **options)
    extract_direction(*pair, output=output, **options)
    extract_direction(*pair, **options).save(tmp_path / "whole.safetensors")
    assert but_for_the_time(output) == but_for_the_time(tmp_path / "whole.safetensors")
    assert AlignmentDirection.load(output).modules[name].metrics["activations"].inputs.shape == (64, 3)


def test_the_command_after_an_interruption(pair, tmp_path, monkeypatch):
    output = tmp_path / "d.safetensors"
    interrupted(pair, output, monkeypatch, rank=4)
    arguments = ["extract", "--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(output), "--rank", "4"]
    done = CliRunner().invoke(asft, [*arguments, "--json"])
    assert json.loads(done.stdout)["sha256"] == AlignmentDirection.load(output).sha256
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.fixture
def with_metric(pair, tmp_path):
    """`extract --metric activations` into d.safetensors, and its arguments for another prompt or option."""
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says no\n")

    def run(*more):
        arguments = ["--base", str(pair[0]), "--aligned", str(pair[1]), "-o", str(tmp_path / "d.safetensors")]
        arguments += ["--rank", "4", "--metric", "activations", "--metric-rank", "4", "--json"]
        return CliRunner().invoke(asft, ["extract", *arguments, "--prompts", str(tmp_path / "prompts.txt"), *more])

    return run


def stopped_after_asking(monkeypatch, run):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", stop)
        run()


def asked_again(monkeypatch, run, *more):
    """Whether a further call asks the model; it ends after that."""

    class Asked(Exception):
        pass

    def ask(*args, **kwargs):
        raise Asked

    with monkeypatch.context() as patch:
        patch.setattr("axolotl_asft.evaluation.kept_metrics.safety_metrics", ask)
        return isinstance(run(*more).exception, Asked)


def test_the_model_is_asked_once(with_metric, tmp_path, monkeypatch):
    output = tmp_path / "d.safetensors"
    asked = tmp_path / "d.safetensors.partial" / "asked.safetensors"
    assert with_metric().exit_code == 0
    assert not asked.parent.exists()
    uninterrupted = but_for_the_time(output)
    output.unlink()
    stopped_after_asking(monkeypatch, with_metric)
    assert asked.is_file()
    assert asked_again(monkeypatch, with_metric, "--metric-rank", "3")
    assert asked_again(monkeypatch, with_metric, "--metric", "fisher")
    kept = asked.read_bytes()
    asked.write_bytes(kept[: len(kept) // 2])
    assert asked_again(monkeypatch, with_metric), "of a damaged file"
    asked.write_bytes(kept)
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says yes\n")
    assert asked_again(monkeypatch, with_metric), "another prompt in the same file"
    (tmp_path / "prompts.txt").write_text("the cat sees a red dog\nthe dog says no\n")
    with monkeypatch.context() as patch:
        others = {"borderline": [Prompt("the dog sees")]}
        home = "axolotl_asft.evaluation.kept_metrics.load_prompts"
        patch.setattr(home, lambda name, split: others.get(name) or load_prompts(name, split))
        assert asked_again(monkeypatch, with_metric), "other harmless prompts of the same name"
    assert not asked_again(monkeypatch, with_metric)
    assert but_for_the_time(output) == uninterrupted
    assert not asked.parent.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_what_was_asked_of_another_model_is_asked_again(with_metric, pair, monkeypatch, name):
    stopped_after_asking(monkeypatch, with_metric)
    before = (pair[1] / name).stat()
    os.utime(pair[1] / name, (before.st_atime, before.st_mtime + 5))
    try:
        assert asked_again(monkeypatch, with_metric)
    finally:
        os.utime(pair[1] / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not asked_again(monkeypatch, with_metric)


def test_a_folder_that_cannot_be_had_is_said_before_the_model_is_asked(with_metric, tmp_path, monkeypatch):
    folder = tmp_path / "d.safetensors.partial"
    folder.write_text("a file")
    assert not asked_again(monkeypatch, with_metric)
    assert "nothing can be written to" in with_metric().output
    folder.unlink()
    folder.mkdir()
    (folder / "thesis.txt").touch()
    assert not asked_again(monkeypatch, with_metric)
    assert "holds thesis.txt; move it away" in with_metric().output
    (folder / "thesis.txt").unlink()
    with Parts(folder, ["a"]):
        assert not asked_again(monkeypatch, with_metric)
        assert "another extraction is running" in with_metric().output


def test_while_the_model_is_asked_nobody_else_begins(with_metric, pair, tmp_path, monkeypatch):
    """And what is cut short leaves nothing, and says so."""
    output, opened = tmp_path / "d.safetensors", []

    def ask(*args, **kwargs):
        with pytest.raises(AsftError, match="another extraction is running in"):
            Parts.open(output, [])
        raise KeyboardInterrupt

    def counted(*args):
        opened.append(args)
        return open_source(*args)

    monkeypatch.setattr("axolotl_asft.evaluation.kept_metrics.safety_metrics", ask)
    monkeypatch.setattr("axolotl_asft.extract.open_source", counted)
    stopped = with_metric()
    assert stopped.exit_code == 1
    assert "nothing is finished that could be kept; the same command begins again\n" in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
    assert len(opened) == 1
    monkeypatch.undo()
    stopped_after_asking(monkeypatch, with_metric)
    assert (tmp_path / "d.safetensors.partial" / "asked.safetensors").is_file()


def test_no_room_for_what_was_asked(with_metric, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("axolotl_asft.evaluation.kept_metrics.save_file", full)
    assert with_metric().exit_code == 0
    assert "cannot be saved (No space left on device)" in caplog.text


def test_metrics_of_both_kinds_come_back_as_they_were(tmp_path):
    import torch

    from axolotl_asft.evaluation.kept_metrics import _read, _write
    from axolotl_asft.evaluation.safety_metrics import AskedModel
    from axolotl_asft.metrics import LayerMetric, ModelMetric

    X, Y = torch.randn(6, 4).T[:, :3], torch.randn(5, 2)
    other = LayerMetric(X.clone(), Y.clone(), 1.0)
    fisher = ModelMetric("fisher", {"a.0.b": LayerMetric(X, Y, 0.25), "c/d": other}, 7, 0.125)
    inputs = ModelMetric("activations", {"a.0.b": LayerMetric(X, None, 0.5)}, 9)
    asked = AskedModel([fisher, inputs], [("Do it.", "No."), ("Be so kind.", "Yes.")])
    _write(tmp_path / "asked.safetensors", "key", asked)
    assert _read(tmp_path / "asked.safetensors", "other") is None
    found = _read(tmp_path / "asked.safetensors", "key")
    assert found.own_answers == asked.own_answers
    for metric, kept in zip(asked.metrics, found.metrics, strict=True):
        assert (kept.name, kept.answers, kept.scale) == (metric.name, metric.answers, metric.scale)
        assert list(kept.layers) == list(metric.layers)
        for name, layer in metric.layers.items():
            assert kept.layers[name].energy == layer.energy
            torch.testing.assert_close(kept.layers[name].X, layer.X, rtol=0, atol=0)
            assert (kept.layers[name].Y is None) == (layer.Y is None)
            if layer.Y is not None:
                torch.testing.assert_close(kept.layers[name].Y, layer.Y, rtol=0, atol=0)
