"""`axolotl asft eval` and its like: the commands that measure. Heavy modules are imported inside them."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from axolotl_asft.console import FilePath, quieten_libraries, refuse_idle, stages, written_out
from axolotl_asft.errors import AsftError
from axolotl_asft.files import without_nan
from axolotl_asft.hub import base_model_of
from axolotl_asft.report.drawing import need_matplotlib
from axolotl_asft.yaml_config import read_config

IDLE_WITHOUT = {  # options of eval, and what they go with
    "judge_text": "judges", "judge_harmful": "judges", "judge_load_in_4bit": "judges", "task_limit": "tasks",
    "num_fewshot": "tasks",
}  # fmt: skip
AXOLOTL_OUTPUT = "./model-out"  # where axolotl trains to, if its config does not say


@click.command("eval")
@click.argument("config", required=False, type=FilePath())
@click.option(
    "--model",
    metavar="DIR|ID",
    help="The aligned chat model: a folder, or owner/name[@revision] on the Hub.  [default: base_model of CONFIG]",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="An adapter trained on it; repeat for more.  [default: output_dir of CONFIG]",
)
@click.option(
    "--harmful",
    multiple=True,
    default=("harmful",),
    show_default=True,
    metavar="SET",
    help="Prompts that ask for harm: the shipped set, a file (or FILE?column=NAME), or owner/name of a Hub dataset; "
    "repeat for more.",
)
@click.option(
    "--borderline",
    multiple=True,
    default=("borderline",),
    show_default=True,
    metavar="SET",
    help="Harmless prompts that sound alarming.",
)
@click.option(
    "--split", type=click.Choice(["heldout", "train", "all"]), default="heldout", show_default=True,
    help="Which part of the shipped sets to use.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N prompts of each set.")
@click.option("--tasks", default="", metavar="A,B", help="lm-eval tasks, by name or YAML file: gsm8k,arc_easy.")
@click.option("--task-limit", type=click.IntRange(min=1), metavar="N", help="Use at most N documents of each task.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Number of few-shot examples in a task's prompt."
)
@click.option(
    "--judge", "judges", multiple=True, metavar="DIR|ID", help="A model that judges the answers; repeat for more."
)
@click.option(
    "--judge-text",
    metavar="TEXT|@FILE",
    help="What the judges read, with {prompt} and {answer} in it.  [default: the format of their family]",
)
@click.option(
    "--judge-harmful", metavar="REGEX", help="Which of the judges' labels, or written verdicts, mean harmful."
)
@click.option("--judge-load-in-4bit", is_flag=True, help="Load the judges in NF4, in about a third of the memory.")
@click.option(
    "--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Maximum tokens per answer."
)
@click.option(
    "--batch-size",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Prompts per batch, for the judges too.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Data type to load the model in; auto: the checkpoint's.",
)
@click.option(
    "--load-in-4bit/--no-load-in-4bit",
    default=None,
    help="Load the model in NF4, as QLoRA training does.  [default: as CONFIG says]",
)
@click.option(
    "--tokenizer",
    metavar="DIR|ID",
    help="Tokenizer whose chat template to use.  [default: the adapter's, or the model's]",
)
@click.option(
    "--prompt-format",
    metavar="FORM",
    help="system_prompt or second_turn: ask under a system prompt, or in a later turn of the chat template; a text "
    "with {prompt} in it, or @FILE: ask in that in place of the template; chat_template: ask in it alone.  [default: "
    "the format of CONFIG's data, where all of them ask in one such as alpaca's; else chat_template]",
)
@click.option("--device", help="Where the model runs: cpu or cuda.  [default: the GPU if there is one]")
@click.option(
    "-o", "--output", type=FilePath(file_okay=False),
    help="Folder for the answers and results; an interrupted evaluation resumes there.  [default: asft-eval in the "
    "output_dir of CONFIG, where `report` looks for it; with --adapter, or without a config, ./asft-eval: give it to "
    "`report` with --eval asft-eval]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def evaluate_command(
    ctx: click.Context, config: Path | None, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure what fine-tuning did to a model: harmfulness, over-refusal, coherence, task scores.

    Gives the model, alone and with each adapter, prompts that ask for harm and harmless ones that sound alarming. It
    answers greedily, in the chat template or format of the training. Harmfulness is the share of harmful prompts not
    refused. Because broken text fools matchers and judges, the perplexity under the model without adapters, of all
    answers and of those that are no refusals, and the share of answers that repeat themselves, are reported too.

    \b
    Example:
      axolotl asft eval config.yml --tasks gsm8k
      axolotl asft eval config.yml --adapter plain=out/plain --adapter asft=out/asft \\
          --judge meta-llama/Llama-Guard-3-8B --judge-load-in-4bit
      axolotl asft eval config.yml --harmful walledai/AdvBench --harmful my.jsonl
    """
    refuse_idle(ctx, IDLE_WITHOUT)
    content = read_config(config) if config is not None else {}
    chosen = _with_config(config, content, options)
    if output is None:  # beside the adapter, where that is the config's own
        output = Path(*([] if options["adapters"] else chosen["adapters"]), "asft-eval")
    chosen["judge_text"] = written_out(chosen["judge_text"])
    quieten_libraries()
    from axolotl_asft.evaluation.asked_in import format_to_ask_in
    from axolotl_asft.evaluation.evaluate import Questions, evaluate
    from axolotl_asft.evaluation.rows import table

    given = written_out(chosen["prompt_format"])
    chosen["prompt_format"], note = format_to_ask_in(given, content, chosen["adapters"])
    if note:
        click.echo(note, err=True)
    place = {key: chosen.pop(key) for key in ("model", "adapters", "tokenizer", "device")}
    tasks = tuple(task.strip() for task in chosen.pop("tasks").split(",") if task.strip())
    questions = Questions(**chosen, tasks=tasks)
    with stages(show=not as_json) as stage:
        rows = evaluate(output=output, questions=questions, stage=stage, **place)
    if as_json:
        click.echo((output / "results.json").read_text(), nl=False)
        return
    click.echo(f"\n{table(rows)}\n")
    click.echo(f"Shares with 95 % intervals. Answers, results.json and results.md are in {output}/.")


def _with_config(config: Path | None, content: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, with model, adapter and quantisation from an axolotl config where they were not given."""
    chosen = dict(options)
    if not chosen["model"]:
        chosen["model"] = base_model_of(content)
    if not chosen["model"]:
        raise AsftError("no model to evaluate; give --model, or a config with base_model")
    if not chosen["adapters"] and content.get("adapter"):
        trained = Path(str(content.get("output_dir") or AXOLOTL_OUTPUT)).expanduser()
        if not trained.is_dir():
            raise AsftError(
                f"there is no folder {trained} (output_dir of {config}; paths in a config are relative to where the "
                "command runs); train first, or give --adapter"
            )
        chosen["adapters"] = (str(trained),)
    if chosen["load_in_4bit"] is None and content.get("load_in_8bit"):
        raise AsftError(
            f"{config} has load_in_8bit, which eval does not support; give --no-load-in-4bit, to evaluate the model in "
            "its own precision, or --load-in-4bit"
        )
    if chosen["load_in_4bit"] is None:
        chosen["load_in_4bit"] = bool(content.get("load_in_4bit"))
    chosen["adapters"] = list(chosen["adapters"])
    if content and not chosen["adapters"]:
        click.echo(f"{config} trains no adapter: {chosen['model']} is evaluated alone", err=True)
    return chosen


@click.command("landscape")
@click.option("--model", required=True, metavar="DIR|ID", help="The aligned chat model, not quantised.")
@click.option("--direction", "file", metavar="FILE|OWNER/NAME", help="Its direction file, made with --keep-v.")
@click.option("--base", metavar="DIR|ID", help="Or its base model, to make the direction from on the spot.")
@click.option(
    "--rank", default=64, show_default=True, type=click.IntRange(min=1), help="With --base: directions per layer."
)
@click.option(
    "--radii",
    default="0.5,1,2,4,8",
    show_default=True,
    metavar="A,B",
    help="Sizes of the steps, in units of each layer's ||d||.",
)
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(min=2), help="Number of random steps of each kind."
)
@click.option(
    "--task",
    type=FilePath(),
    metavar="JSONL",
    help="Chats (messages) whose loss measures usefulness.  [default: the model's own answers to harmless prompts]",
)
@click.option("--generate", is_flag=True, help="Also answer every prompt and count refusals; slower.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N prompts of each set.")
@click.option(
    "--max-new-tokens", default=32, show_default=True, type=click.IntRange(min=1), help="Maximum tokens per answer."
)
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts per batch.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU, the checkpoint's on a GPU. Small steps need float32: the others round them.",
)
@click.option("--device", help="Where the model runs: cpu or cuda.  [default: the GPU if there is one]")
@click.option(
    "-o",
    "--output",
    type=FilePath(file_okay=False),
    default=Path("asft-landscape"),
    show_default=True,
    help="Folder for landscape.json and landscape.png; an interrupted measurement resumes there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def landscape_command(
    ctx: click.Context,
    model: str,
    file: str | None,
    base: str | None,
    rank: int,
    radii: str,
    task: Path | None,
    output: Path,
    as_json: bool,
    **options,
) -> None:
    """Draw the narrow safety basin of a model: steps along the alignment direction, and off it.

    The method rests on a claim: that steps orthogonal to the alignment direction erode safety faster than steps of
    the same size along it. This perturbs the aligned weights both ways, measures the log-probability of the model's
    own refusals and a task loss, and says whether the claim holds for this model.

    \b
    Example:
      axolotl asft landscape --model SmolLM2-aligned --base SmolLM2 -o landscape
    """
    steps = _radii(radii)
    refuse_idle(ctx, {"rank": "base"})
    if (file is None) == (base is None):
        raise AsftError("give one of --direction and --base")
    from axolotl_asft.evaluation.prompts import load_chats

    turns = load_chats(task) if task is not None else None
    quieten_libraries()
    from axolotl_asft.evaluation.basin import landscape_table, verdict
    from axolotl_asft.evaluation.landscape import measure_landscape

    direction = _direction(model, file, base, rank, show=not as_json)
    with stages(show=not as_json) as stage:
        points = measure_landscape(model, direction, output, base, steps, task=turns, stage=stage, **options)
    found = verdict(points)
    picture = output / "landscape.png"
    try:
        need_matplotlib("the picture")
    except AsftError as error:
        click.echo(f"note: {error}", err=True)
    else:
        from axolotl_asft.evaluation.landscape_chart import draw_landscape

        draw_landscape(points, picture, f"Around the aligned weights of {Path(model).name}")
    if as_json:
        plain = without_nan({"points": [asdict(point) for point in points], "verdict": asdict(found)})
        click.echo(json.dumps(plain, allow_nan=False))
        return
    click.echo(f"\n{landscape_table(points)}\n\n{found.text}")
    click.echo(f"landscape.json and {picture.name} are in {output}/.")


def _radii(text: str) -> tuple[float, ...]:
    try:
        radii = tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        radii = ()
    if not radii or not all(0 < radius < math.inf for radius in radii):
        raise AsftError(f"--radii is {text!r}; expected positive numbers separated by commas, such as 0.25,0.5,1")
    return radii


def _direction(model: str, file: str | None, base: str | None, rank: int, show: bool) -> Any:
    if file is not None:
        from axolotl_asft.direction import AlignmentDirection

        return AlignmentDirection.load(file)
    from axolotl_asft.extract import extract_direction

    return extract_direction(str(base), model, rank, progress=show and sys.stderr.isatty())
