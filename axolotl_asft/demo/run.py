"""The stages of the demo, each resumable: what is finished with the same settings is not done again."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from axolotl_asft import __version__
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.demo.configs import FineTuning, write_configs
from axolotl_asft.demo.prompts import REFUSAL, DemoData, Turn, make_data
from axolotl_asft.errors import AsftError, WorkFailed
from axolotl_asft.files import atomic_write_text, read_json
from axolotl_asft.report.drawing import need_matplotlib

LOG = logging.getLogger("axolotl.asft")

BASE_STEPS, BASE_RATE = 400, 3e-3
ALIGNED_STEPS, ALIGNED_RATE = 200, 1e-3
ASKED = 200  # prompts whose refusals make the metric
# Everything that the numbers depend on; a change makes the stages run again.
RECIPE = 3
OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Row:
    """One model of the demo's table.

    Attributes:
        harmfulness: share of held-out harmful prompts not refused.
        task_accuracy: share of held-out tickets answered exactly right.
        over_refusal: share of held-out harmless prompts refused.
        update_norm: ||dW|| of the adapter; None where there is none.
    """

    model: str
    harmfulness: float
    task_accuracy: float
    over_refusal: float
    update_norm: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: base, aligned, plain and AsFT, in this order."""

    rows: tuple[Row, ...]
    settings: FineTuning
    seconds: float


def run_demo(output: Path, seed: int = 0, stage: Stage = silent) -> DemoResult:
    """Make a base model, align it, extract the direction, fine-tune it plain and under AsFT, and score all four.

    Everything is kept in `output`: checkpoints, the direction file, both configs, logs, results.json and results.md,
    and results.png where matplotlib is installed.

    Args:
        output: a folder for the demo alone; an interrupted demo goes on there.
        seed: of the data, the models and the training.
        stage: called with a title and a number of units at every stage; its result is called once a unit.

    Raises:
        AsftError: the folder holds something else, or a training run failed.
    """
    output = Path(output)
    settings = FineTuning(seed=seed)
    _claim(output, settings)
    started = time.monotonic()
    data = make_data(seed, poison=settings.poison)
    quieten_libraries()
    tokenizer = _make_models(output, data, seed, stage)
    _extract(output, data, stage)
    _write_dataset(output / "task.jsonl", data.poisoned)
    plain, constrained = write_configs(output, settings)
    _train(plain, settings.steps, stage)
    _train(constrained, settings.steps, stage)
    rows = _score(output, tokenizer, data, stage)
    result = DemoResult(rows, settings, time.monotonic() - started)
    _write_results(output, result)
    return result


def table(result: DemoResult) -> str:
    """The result as an aligned Markdown table."""
    lines = [
        "| model              | harmfulness | task accuracy | harmless refused | update norm |",
        "| ------------------ | ----------: | ------------: | ---------------: | ----------: |",
    ]
    for row in result.rows:
        norm = "" if row.update_norm is None else f"{row.update_norm:.2f}"
        lines.append(
            f"| {row.model:<18} | {row.harmfulness:>11.1%} | {row.task_accuracy:>13.1%} | {row.over_refusal:>16.1%} "
            f"| {norm:>11} |"
        )
    return "\n".join(lines)


def _claim(output: Path, settings: FineTuning) -> None:
    """Take the folder for these settings, or refuse to touch what is in it."""
    marker = output / "demo.json"
    wanted = {"recipe": RECIPE, "version": __version__, **asdict(settings)}
    if marker.is_file():
        if read_json(marker, "give another --output, or delete it") != wanted:
            raise AsftError(f"{output} holds a demo with other settings; give another --output, or delete it")
        return
    if output.exists() and any(output.iterdir()):
        raise AsftError(f"{output} is not empty and holds no demo; give another --output")
    atomic_write_text(marker, json.dumps(wanted, indent=2) + "\n")


def _done(folder: Path, name: str) -> bool:
    return (folder / f".{name}.done").exists()


def _finish(folder: Path, name: str) -> None:
    atomic_write_text(folder / f".{name}.done", "")


def _make_models(output: Path, data: DemoData, seed: int, stage: Stage) -> Any:
    from transformers import AutoModelForCausalLM

    from axolotl_asft.demo.model import fit, make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    advance = stage("train a small base model", BASE_STEPS)
    if not _done(output, "base"):
        model = make_model(tokenizer, seed)
        fit(model, tokenizer, data.base, BASE_STEPS, BASE_RATE, seed, advance)
        save(model, tokenizer, output / "base")
        _finish(output, "base")
    advance = stage("align it: learn to refuse", ALIGNED_STEPS)
    if not _done(output, "aligned"):
        model = AutoModelForCausalLM.from_pretrained(output / "base")
        fit(model, tokenizer, data.alignment, ALIGNED_STEPS, ALIGNED_RATE, seed + 1, advance)
        save(model, tokenizer, output / "aligned")
        _finish(output, "aligned")
    return tokenizer


def _extract(output: Path, data: DemoData, stage: Stage) -> None:
    """The direction, with the Fisher metric of refusals that the alignment taught: nothing held out is asked."""
    from axolotl_asft.evaluation.safety_metrics import safety_metrics
    from axolotl_asft.extract import extract_direction

    advance = stage("extract the alignment direction", 1)
    if not (output / "direction.safetensors").exists():
        for name, wanted in (("harmful.txt", True), ("harmless.txt", False)):
            prompts = [turn.prompt for turn in data.alignment if (turn.answer == REFUSAL) == wanted]
            atomic_write_text(output / name, "\n".join(prompts[:ASKED]) + "\n")
        sets = str(output / "harmful.txt"), str(output / "harmless.txt")
        asked = safety_metrics(str(output / "aligned"), ["fisher"], *sets, device="cpu")
        direction = extract_direction(
            output / "base", output / "aligned", metrics=asked.metrics, own_answers=asked.own_answers
        )
        direction.save(output / "direction.safetensors")
        advance()


def _write_dataset(path: Path, turns: list[Turn]) -> None:
    lines = []
    for turn in turns:
        messages = [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
        lines.append(json.dumps({"messages": messages}))
    atomic_write_text(path, "\n".join(lines) + "\n")


def _train(config: Path, steps: int, stage: Stage) -> None:
    """`axolotl train CONFIG` in a process of its own, its output in CONFIG's .log."""
    name = config.stem
    advance = stage(f"axolotl train {config.name}", steps)
    if _done(config.parent, name):
        return
    log = config.with_suffix(".log")
    command = [sys.executable, "-u", "-m", "axolotl.cli.main", "train", config.name, "--launcher", "python"]
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **text}
    with (
        log.open("w", **text) as file,
        subprocess.Popen(command, cwd=config.parent, env={**os.environ, **OFFLINE}, **output) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if line.startswith("{'loss'"):
                    for _ in range(5):  # logging_steps of the configs
                        advance()
        except BaseException:  # an interrupt may have reached this process alone
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        last = [line for line in log.read_text(**text).splitlines() if line.strip()][-1:]
        raise WorkFailed(f"axolotl train {config.name} failed: {''.join(last)} (whole log: {log})")
    _finish(config.parent, name)


def _score(output: Path, tokenizer: Any, data: DemoData, stage: Stage) -> tuple[Row, ...]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from axolotl_asft.demo.score import score
    from axolotl_asft.diagnostics import adapter_drift
    from axolotl_asft.direction import AlignmentDirection

    direction = AlignmentDirection.load(output / "direction.safetensors")
    advance = stage("ask held-out prompts", 4)
    rows = []
    for name, folder, adapter in (
        ("base", "base", None),
        ("aligned", "aligned", None),
        ("plain QLoRA", "aligned", "plain"),
        ("QLoRA with AsFT", "aligned", "asft"),
    ):
        model: Any = AutoModelForCausalLM.from_pretrained(output / folder)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, output / adapter)
        row = Row(name, **score(model.eval(), tokenizer, data).as_dict())
        if adapter is not None:
            row = replace(row, update_norm=adapter_drift(output / adapter, direction).update_norm)
        rows.append(row)
        advance()
    return tuple(rows)


def _write_results(output: Path, result: DemoResult) -> None:
    atomic_write_text(output / "results.json", json.dumps(asdict(result), indent=2) + "\n")
    atomic_write_text(output / "results.md", table(result) + "\n")
    try:
        need_matplotlib("results.png")
    except AsftError as error:
        LOG.warning(error)
        return
    from axolotl_asft.demo.chart import draw

    draw(result, output / "results.png")
