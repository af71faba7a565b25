"""`axolotl asft check`, `recipes`, `schema`, `answers`: about configs and data. Heavy modules are imported inside."""

import builtins
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from axolotl_asft.console import FilePath, OneLineErrors, quietly, written_out
from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text, refuse_to_replace_file
from axolotl_asft.guard import OPTIONS, declarations
from axolotl_asft.yaml_config import read_config


def block_options(command: Callable) -> Callable:
    """The options of `axolotl train` that set keys of the block; too many for the help of a command that looks."""
    for key, kind in OPTIONS.items():
        add = click.option(*declarations(key), key, type=getattr(builtins, kind), default=None, hidden=True)
        command = add(command)
    return command


@click.command()
@click.argument("config", type=FilePath())
@block_options
@click.option(
    "--trust-remote-code",
    "remote_code",
    is_flag=True,
    help="Build the model with the code from its repository, if the config says trust_remote_code: true.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def check(ctx: click.Context, config: Path, remote_code: bool, as_json: bool, **block: Any) -> None:
    """Check a config before it is run: what is constrained, at what cost, and what is wrong.

    A dry run in seconds. It reads the config as `axolotl train` does, builds the model without its weights, puts LoRA
    on it, and matches every layer with the direction file by the run's own rules. No GPU is needed, no data are read,
    and nothing is written. Overrides such as `--asft.lambda_reg 5` work as in `axolotl train`.

    Exit status: 0 if nothing it checks would stop the run (there may be warnings), 2 if something would.

    \b
    Example:
      axolotl asft check config.yml
      axolotl asft check config.yml --asft.lambda_reg 5 --json
    """
    with quietly():
        from axolotl_asft.check_text import check_text
        from axolotl_asft.dry_run import check_config

        found = check_config(config, remote_code, {key: value for key, value in block.items() if value is not None})
    click.echo(json.dumps(found.as_dict()) if as_json else check_text(found))
    ctx.exit(0 if found.fine else 2)


@click.group(cls=OneLineErrors)
def recipes() -> None:
    """Complete configs to start from: one per model family and GPU memory size.

    \b
    Example:
      axolotl asft recipes list
      axolotl asft recipes copy llama-3.1-8b-qlora-24gb --direction owner/name@revision
    """


@recipes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_recipes(as_json: bool) -> None:
    """List the shipped configs.

    \b
    Example:
      axolotl asft recipes list
    """
    from axolotl_asft.recipes import recipes as shipped

    found = shipped()
    if as_json:
        click.echo(json.dumps([recipe.as_dict() for recipe in found]))
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        click.echo(f"{recipe.name:<{width}}  {recipe.title}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped config.

    \b
    Example:
      axolotl asft recipes show llama-3.1-8b-qlora-24gb
    """
    from axolotl_asft.recipes import recipe

    click.echo(recipe(name).text, nl=False)


@recipes.command()
@click.argument("name")
@click.option("-o", "--output", type=FilePath(), help="File to write.  [default: NAME.yml]")
@click.option(
    "--direction", metavar="FILE|OWNER/NAME", help="Direction to write into the config; owner/name@revision pins one."
)
@click.option("--sha256", metavar="HASH", help="The direction's sha256, to pin the file's bytes.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the file written as JSON.")
def copy(name: str, output: Path | None, direction: str | None, sha256: str | None, force: bool, as_json: bool) -> None:
    """Copy a shipped config, to make it your own.

    \b
    Example:
      axolotl asft recipes copy llama-3.1-8b-qlora-24gb -o config.yml
      axolotl asft recipes copy qwen-2.5-7b-qlora-16gb --direction owner/name@revision --sha256 HASH
    """
    from axolotl_asft.recipes import copy_recipe, missing_direction, recipe

    target = output or Path(f"{recipe(name).name}.yml")
    copy_recipe(name, target, direction, sha256, force)
    if (missing := missing_direction(direction)) is not None:
        click.echo(f"note: {missing}", err=True)
    if as_json:
        click.echo(json.dumps({"file": str(target), "recipe": recipe(name).name}))
        return
    named = shlex.quote(str(target))
    click.echo(f"{target}\n\nNext:\n  axolotl asft check {named}\n  axolotl train {named}")


@click.command()
@click.option("-o", "--output", type=FilePath(), help="File to write.  [default: print it]")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def schema(output: Path | None, force: bool) -> None:
    """Print the JSON schema of the asft: block, for completion and checks in an editor.

    VS Code with the YAML extension (yaml-language-server) reads it from a first line in the config:

    \b
      # yaml-language-server: $schema=./asft.schema.json

    or for all configs of a workspace from .vscode/settings.json:

    \b
      {"yaml.schemas": {"./asft.schema.json": ["*.yml"]}}

    \b
    Example:
      axolotl asft schema -o asft.schema.json
    """
    if output is not None:
        refuse_to_replace_file(output, force)
    from axolotl_asft.schema import config_schema

    text = json.dumps(config_schema(), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        atomic_write_text(output, text)
        click.echo(str(output))


@click.command()
@click.argument("file", metavar="FILE|OWNER/NAME")
@click.argument("config", type=FilePath(), required=False)
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    default=Path("own-answers.jsonl"),
    show_default=True,
    help="File to write.",
)
@click.option(
    "--lines",
    type=click.IntRange(1),
    metavar="N",
    help="Lines to write; the answers are repeated.  [default: each once in each way of asking]",
)
@click.option(
    "--general-formats/--no-general-formats",
    default=True,
    show_default=True,
    help="Each answer under a general system prompt or in a later turn too, as an anchor asks; twice as many lines.",
)
@click.option(
    "--prompt-format",
    "formats",
    multiple=True,
    metavar="TEXT|@FILE",
    help="Each answer in this format of your data too, with {prompt} in the request's place; repeat for more.  "
    "[default: those of CONFIG's data, such as alpaca's]",
)
@click.option(
    "--model",
    metavar="DIR|ID",
    help="Whose tokenizer writes these.  [default: base_model of CONFIG, or the aligned model, where the file names "
    "one of the Hub]",
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def answers(
    file: str,
    config: Path | None,
    output: Path,
    lines: int | None,
    general_formats: bool,
    formats: tuple[str, ...],
    model: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the aligned model's own answers, which a direction file keeps, as training data.

    For a run that the constraint cannot join: full fine-tuning, DeepSpeed's ZeRO-3, tensor parallelism. Mixed into your
    data, they hold the model to its refusals in another way, at the price of more steps and of more harmless prompts
    refused. It takes many of them: the anchor asks 8 at every optimizer step. Half of the lines are first turns of a
    chat, half stand under a general system prompt or in a later turn, where first turns alone hold little. Data that
    ask in a format of their own want a third in that: CONFIG, the YAML of the run, says which, or --prompt-format.

    \b
    Example:
      axolotl asft answers chat.asft.safetensors config.yml -o own-answers.jsonl --lines 5000
      axolotl asft answers chat.asft.safetensors --model models/aligned --prompt-format @format.txt
    """
    refuse_to_replace_file(output, force)
    content = read_config(config) if config is not None else {}
    from axolotl_asft.answer_data import TYPE, in_formats, write_answers
    from axolotl_asft.direction import AlignmentDirection
    from axolotl_asft.hub import base_model_of
    from axolotl_asft.prompt_formats import asked_in, checked_formats
    from axolotl_asft.spec import own_answers_in
    from axolotl_asft.summary import declining
    from axolotl_asft.yaml_config import scalar

    spec = AlignmentDirection.load(file).spec
    asked = turns = own_answers_in(spec)
    texts = checked_formats([str(written_out(text)) for text in formats] or _formats_of_data(content))
    if model is not None and not (general_formats or texts):
        raise click.UsageError("--model writes other formats than the first turn; without any it has nothing to do")
    if turns and (general_formats or texts):
        asked = in_formats(_aligned_tokenizer(spec, model or base_model_of(content)), turns, texts, general_formats)
    count, no = write_answers(asked, output, lines), declining(turns)
    if as_json:
        told = {"lines": count, "answers": len(turns), "declining": no, "general_formats": general_formats}
        click.echo(json.dumps({"file": str(output), **told, "prompt_formats": texts}))
        return
    click.echo(
        f"{output}: {count} lines of {len(turns)} answers, {no} of which decline{asked_in(texts, general_formats)}\n\n"
        f"Use it, beside your own data:\n  datasets:\n    - path: {scalar(output)}\n      type: {TYPE}"
    )


def _formats_of_data(content: Mapping[str, Any]) -> list[str]:
    """In which the data of a config ask; a line for those that cannot be told."""
    from axolotl_asft.evaluation.asked_in import formats_of_data

    with quietly():
        found = formats_of_data(content)
    for one in found:
        if one.text is None:
            told = f"datasets: {one.path} is of type {one.kind}, in whose prompts nothing is asked"
            click.echo(f"{told}; give the text around a request as --prompt-format, with {{prompt}} in it", err=True)
    return [one.text for one in found if one.text is not None]


def _aligned_tokenizer(spec: Mapping[str, Any], model: str | None) -> Any:
    """That of a model, or of the aligned one that a direction file names."""
    from axolotl_asft.evaluation.models import load_tokenizer
    from axolotl_asft.hub import hub_model

    aligned = spec["aligned"]
    revision = f"@{aligned['revision']}" if aligned.get("revision") else ""
    instead = "give --model, or write first turns alone (--no-general-formats), which hold little elsewhere"
    if model is None and hub_model(aligned["id"]) is None:
        raise AsftError(
            f"the direction file has no more than a name for the aligned model ({aligned['id']!r}), whose tokenizer is "
            f"needed: {instead}"
        )
    try:
        return load_tokenizer(model or f"{aligned['id']}{revision}")
    except AsftError as error:
        raise type(error)(f"{error}; its tokenizer is needed: {instead}") from error


CONFIG_COMMANDS = (check, recipes, schema, answers)
