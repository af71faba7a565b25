"""`axolotl asft extract` and its like: making, showing and sharing directions. Heavy modules are imported inside."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from axolotl_asft.console import FilePath, given_options, stages
from axolotl_asft.errors import AsftError
from axolotl_asft.files import refuse_to_replace_file
from axolotl_asft.strengths import WEIGHTS_ALONE

OF_A_METRIC = ("prompts", "metric_rank", "metric_energy", "load_in_4bit", "batch_size")
OF_AN_AUTOMATIC_RANK = ("tolerance", "energy", "max_rank")


def _rank(ctx: click.Context, parameter: click.Parameter, value: str) -> int | str | None:
    if value == "full":
        return value
    if value == "auto":
        return None
    try:
        rank = int(value)
    except ValueError:
        rank = 0
    if rank < 1:
        raise click.BadParameter(f"{value!r}; expected a positive number, 'full', or 'auto' with --tolerance")
    return rank


def _refuse_idle(ctx: click.Context) -> None:
    """Refuse options that would do nothing, since what they go with is not given.

    Raises:
        AsftError: there is such an option.
    """
    given = given_options(ctx)
    for name in OF_A_METRIC if not ctx.params["metric_names"] else ():
        if name in given:
            raise AsftError(f"{_option(name)} goes with --metric; add --metric fisher, or leave it out")
    rank = ctx.params["rank"]
    for name in OF_AN_AUTOMATIC_RANK if rank is not None else ():
        if name in given:
            raise AsftError(f"{_option(name)} goes with --rank auto, but the rank is {rank}; add --rank auto")
    if {"tolerance", "energy"} <= given:
        raise AsftError("--tolerance and --energy both set how many directions are kept; give only one")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@click.command()
@click.option("--base", metavar="DIR|ID", help="The base model: a folder in safetensors, or owner/name.")
@click.option("--aligned", metavar="DIR|ID", help="The aligned (chat) model, given in the same way.")
@click.option(
    "--adapter",
    metavar="DIR|ID",
    help="A LoRA adapter (PEFT) that is the difference itself. It replaces --base if it was merged into --aligned, or "
    "--aligned, which is then the base with it merged in.",
)
@click.option("-o", "--output", required=True, type=FilePath(), help="Direction file to write.")
@click.option(
    "--rank",
    default="64",
    show_default=True,
    callback=_rank,
    help="Directions per layer, K: a number, 'full', or 'auto' for the smallest K that meets --tolerance or --energy.",
)
@click.option(
    "--tolerance", default=0.01, show_default=True, help="With --rank auto: error of the paper penalty per ||dW||^2."
)
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="With --rank auto: smallest K that captures this share of ||d||^2, in place of --tolerance.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="K",
    help="With --rank auto: upper limit on K; recommended for large models.",
)
@click.option(
    "--modules",
    multiple=True,
    metavar="REGEX",
    help="Extract only modules that match; repeat for more.  [default: all linear layers]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Data type of the stored vectors.",
)
@click.option("--keep-v", is_flag=True, help="Store the right singular vectors too (a larger file).")
@click.option(
    "--metric",
    "metric_names",
    multiple=True,
    type=click.Choice(["fisher", "activations"]),
    help="Also store this metric, for asft.metric: what keeps the aligned model's refusals (fisher), or its outputs on "
    "prompts that ask for harm (activations). Loads the aligned model; repeat for both.",
)
@click.option(
    "--prompts",
    multiple=True,
    default=["harmful"],
    show_default=True,
    metavar="SET",
    help="Prompts for --metric: the shipped set, a file, or owner/name of a Hub dataset; behaviour unlike these "
    "prompts is preserved less. Repeat for several: --prompts harmful --prompts mine.txt uses the shipped set and "
    "yours, --prompts mine.txt alone replaces the shipped one. The shipped harmless prompts are asked in any case.",
)
@click.option(
    "--metric-rank", default=256, show_default=True, type=click.IntRange(min=1), help="Maximum directions per layer."
)
@click.option(
    "--metric-energy",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Keep the fewest directions that explain this share of the metric; 1 always keeps --metric-rank.",
)
@click.option("--load-in-4bit", is_flag=True, help="Load the aligned model in 4-bit for --metric, to save memory.")
@click.option(
    "--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts per batch, for --metric."
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the randomised SVD.")
@click.option(
    "--device",
    help="Where the linear algebra runs: cpu, cuda (every GPU), or some of them: cuda:0,cuda:1.  [default: cpu; for "
    "--metric, the GPU if there is one]",
)
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def extract(
    ctx: click.Context,
    output: Path,
    as_json: bool,
    force: bool,
    modules: tuple[str, ...],
    metric_names: tuple[str, ...],
    prompts: tuple[str, ...],
    metric_rank: int,
    metric_energy: float,
    load_in_4bit: bool,
    batch_size: int,
    device: str | None,
    **options: Any,
) -> None:
    """Make a direction file from a base model and its aligned model.

    Reads one pair of weights at a time: memory holds the largest pair, not the models. A model on the Hub that is not
    in the local cache is read from there, tensor by tensor, and takes no disk space; owner/name@revision pins it.
    Finished layers and what --metric found are kept in OUTPUT.partial/: if interrupted, the same command resumes there.

    \b
    Example:
      axolotl asft extract --base meta-llama/Llama-3.1-8B --aligned meta-llama/Llama-3.1-8B-Instruct \\
          --metric fisher -o llama3-8b.asft.safetensors
      axolotl asft extract --aligned my-merged-model --adapter my-refusal-lora -o mine.asft.safetensors
    """
    _refuse_idle(ctx)
    if output.suffix != ".safetensors":
        raise AsftError(f"--output is {output}; expected a name that ends in .safetensors")
    refuse_to_replace_file(output, force)
    from axolotl_asft.extract import extract_direction
    from axolotl_asft.partial import ASKED, partial_folder
    from axolotl_asft.summary import recommended, summary, summary_table
    from axolotl_asft.yaml_config import scalar

    aligned, partial = options["aligned"], partial_folder(output)
    if metric_names and aligned is None:
        raise AsftError("--metric is taken from the aligned model; merge the adapter and give --aligned")

    def ask() -> tuple[Any, Any]:
        from axolotl_asft.evaluation.kept_metrics import asked_once
        from axolotl_asft.hub import model_folder

        with stages(show=not as_json) as stage:
            found = asked_once(
                partial / ASKED,
                str(model_folder(aligned)),
                metric_names,
                prompts,
                rank=metric_rank,
                energy=metric_energy,
                load_in_4bit=load_in_4bit,
                device=device.partition(",")[0] if device else None,
                batch_size=batch_size,
                stage=stage,
            )
        return found.metrics, found.own_answers

    options |= {"modules": list(modules) or None, "device": device or "cpu", "metrics": ask if metric_names else ()}
    show = sys.stderr.isatty() and not as_json
    try:
        direction = extract_direction(progress=show, output=output, **options)
    except KeyboardInterrupt:
        kept = f"{partial} holds what is done; the same command resumes there"
        nothing = "nothing is finished that could be kept; the same command begins again"
        click.echo(f"\n{kept if partial.exists() else nothing}", err=True)
        raise
    result = summary(direction, output)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(summary_table(result))
        settings = textwrap.indent(recommended(direction.spec), "  ")
        click.echo(f"\nUse it:\n  plugins: [asft]\n  asft:\n    direction: {scalar(output)}\n{settings}".rstrip())
        if not settings:
            click.echo(f"\n{WEIGHTS_ALONE}")


@click.command()
@click.argument("file", metavar="FILE|OWNER/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--modules/--no-modules", default=True, help="List every module.  [default: --modules]")
@click.option("--plot", type=FilePath(dir_okay=False), metavar="FILE.png", help="Also plot it (matplotlib).")
def inspect(file: str, as_json: bool, modules: bool, plot: Path | None) -> None:
    """Show what a direction file holds: models, modules, ranks, captured energy, error bounds.

    \b
    Example:
      axolotl asft inspect chat.asft.safetensors --plot chat.png
      axolotl asft inspect owner/name@revision
    """
    from axolotl_asft.direction import AlignmentDirection
    from axolotl_asft.hub import direction_path
    from axolotl_asft.report.drawing import need_matplotlib
    from axolotl_asft.summary import module_table, summary, summary_table

    if plot is not None and plot.suffix.lower() != ".png":
        raise AsftError(f"--plot is {plot}; expected a name that ends in .png")
    path = direction_path(file)
    direction = AlignmentDirection.load(path)
    if plot is not None:
        need_matplotlib("--plot")
        from axolotl_asft.spectra_chart import draw_spectra

        draw_spectra(direction, plot)
    result = summary(direction, path)
    if as_json:
        click.echo(json.dumps(result))
        return
    if plot is not None:
        click.echo(f"{plot}\n")
    click.echo(summary_table(result))
    if modules:
        click.echo("\n" + module_table(result))


@click.command()
@click.argument("first", metavar="FILE|OWNER/NAME")
@click.argument("second", metavar="FILE|OWNER/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--modules/--no-modules", default=True, help="List every module.  [default: --modules]")
def diff(first: str, second: str, as_json: bool, modules: bool) -> None:
    """Compare two directions: principal angles between their spans, layer by layer.

    For example of two revisions of a model, of two ways to align it, or of a file you were given and your own.

    \b
    Example:
      axolotl asft diff mine.asft.safetensors owner/name
    """
    from axolotl_asft.compare import compare, comparison_text
    from axolotl_asft.direction import AlignmentDirection

    result = compare(AlignmentDirection.load(first), AlignmentDirection.load(second))
    click.echo(json.dumps(result) if as_json else comparison_text(result, modules))


@click.command()
@click.argument("file", type=FilePath())
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--name", default="direction.safetensors", show_default=True, help="File name; a repository can hold several."
)
@click.option("--private", is_flag=True, help="Make a new repository private, and refuse a public one.")
@click.option("--license", metavar="ID", help="License in a new card: apache-2.0, llama3.1, ...  [default: other]")
@click.option("--message", default="Add an alignment direction", show_default=True, help="Commit message.")
@click.option("--json", "as_json", is_flag=True, help="Print its address on the Hub as JSON.")
def push(file: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Share a direction file on the Hugging Face Hub, with a card that says what it is and how to use it.

    Log in first: `hf auth login`. The repository is created if it does not exist. A card of your own in it is not
    changed, nor is what you wrote around our section of one. The prompts and answers that the file keeps for
    anchor_weight are uploaded with it, verbatim: `axolotl asft inspect FILE --json` shows them.

    \b
    Example:
      axolotl asft push llama-3.1-8b.asft.safetensors me/llama-3.1-8b-asft --license llama3.1
    """
    from axolotl_asft.publish import push_direction

    found = push_direction(file, repository, **options)
    if as_json:
        click.echo(json.dumps(vars(found)))
        return
    card = "" if found.card else " (the repository's own card was left as it is)"
    click.echo(
        f"{found.url}{card}\n\nUse it:\n  plugins: [asft]\n  asft:\n    direction: {found.direction}\n"
        f"    direction_sha256: {found.sha256}"
    )


DIRECTION_COMMANDS = (extract, inspect, diff, push)
