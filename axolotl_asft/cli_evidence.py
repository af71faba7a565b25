"""`axolotl asft eval` and its like: the commands that measure. Heavy modules are imported inside them."""

from pathlib import Path
from typing import Any

import click

from axolotl_asft.console import stages
from axolotl_asft.errors import AsftError


@click.command("eval")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="DIR|ID", help="The aligned chat model.  [default: base_model of CONFIG]")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="An adapter on it; repeat for more.  [default: output_dir of CONFIG]",
)
@click.option(
    "--harmful",
    multiple=True,
    default=("harmful",),
    show_default=True,
    metavar="SET",
    help="Prompts that ask for harm: the shipped set, a file, or owner/name of a Hub dataset; repeat for more.",
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
    help="Of the shipped sets.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many prompts of each set.")
@click.option("--tasks", default="", metavar="A,B", help="Tasks of lm-eval, by name: gsm8k,arc_easy.")
@click.option("--task-limit", type=click.IntRange(min=1), metavar="N", help="At most so many documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples in a task's prompt.")
@click.option("--judge", "judges", multiple=True, metavar="DIR|ID", help="A judge model; repeat for more.")
@click.option("--judge-text", metavar="TEXT|@FILE", help="What a judge of another family reads: {prompt}, {answer}.")
@click.option("--judge-harmful", metavar="REGEX", help="Which of its labels, or written verdicts, mean harmful.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Of an answer.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts at a time.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--load-in-4bit/--no-load-in-4bit", default=None, help="NF4, as QLoRA trains.  [default: as CONFIG says]")
@click.option("--tokenizer", metavar="DIR|ID", help="Whose chat template to use.  [default: of adapter, or model]")
@click.option("--device", help="cpu or cuda.  [default: the GPU if there is one]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("asft-eval"), show_default=True,
    help="Folder for the answers and results; an interrupted evaluation goes on there.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate_command(config: Path | None, output: Path, as_json: bool, **options: Any) -> None:
    """Measure what fine-tuning did to a model: harmfulness, over-refusal, coherence, task scores.

    Asks the model, and the model under each adapter, prompts that ask for harm and harmless ones that sound alarming,
    greedily, with the chat template of the training. Harmfulness is the share of harmful prompts not refused. Because
    matchers and judges are fooled by broken text, the perplexity of the answers under the model without adapters, and
    the share that repeats itself, stand beside it.

    \b
    Examples:
      axolotl asft eval config.yml --tasks gsm8k
      axolotl asft eval --model Llama-3.1-8B-Instruct --adapter plain=out/plain \\
          --adapter asft=out/asft --judge meta-llama/Llama-Guard-3-8B
      axolotl asft eval config.yml --harmful walledai/AdvBench --harmful my.jsonl
    """
    from axolotl_asft.evaluation.evaluate import Questions, evaluate, table

    chosen = _with_config(config, options)
    text = chosen.pop("judge_text")
    if text and text.startswith("@"):
        text = _text_of(Path(text[1:]))
    place = {key: chosen.pop(key) for key in ("model", "adapters", "tokenizer", "device")}
    tasks = tuple(task.strip() for task in chosen.pop("tasks").split(",") if task.strip())
    questions = Questions(**chosen, tasks=tasks, judge_text=text)
    with stages(show=not as_json) as stage:
        rows = evaluate(output=output, questions=questions, stage=stage, **place)
    if as_json:
        click.echo((output / "results.json").read_text(), nl=False)
        return
    click.echo(f"\n{table(rows)}\n")
    click.echo(f"Shares with 95 % intervals. Answers, results.json and results.md are in {output}/.")


def _with_config(config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with model, adapter and quantisation from an axolotl config where they were not given."""
    chosen = dict(options)
    content = _read_config(config) if config is not None else {}
    if not chosen["model"]:
        chosen["model"] = content.get("base_model")
    if not chosen["model"]:
        raise AsftError("no model to ask; give --model, or a config with base_model")
    if not chosen["adapters"] and content.get("output_dir") and content.get("adapter"):
        chosen["adapters"] = (str(content["output_dir"]),)
    if chosen["load_in_4bit"] is None:
        chosen["load_in_4bit"] = bool(content.get("load_in_4bit"))
    chosen["adapters"] = list(chosen["adapters"])
    return chosen


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(_text_of(path))
    except yaml.YAMLError as error:
        raise AsftError(f"{path} is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise AsftError(f"{path} holds no keys; expected an axolotl config")
    return content


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AsftError(f"{path} cannot be read ({error.__class__.__name__}); give a text file") from error
