"""`axolotl asft ...`: the commands. Heavy modules are imported inside them, so that --help is quick."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from axolotl_asft import __version__
from axolotl_asft.cli_evidence import evaluate_command, landscape_command
from axolotl_asft.console import OneLineErrors, quieten_libraries, stages
from axolotl_asft.errors import AsftError


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="axolotl-asft")
def asft() -> None:
    """Keep a chat model's safety while you fine-tune it (AsFT, arXiv 2506.08473).

    \b
    1. axolotl asft extract --base BASE --aligned CHAT -o chat.asft.safetensors
    2. add to your config:
         plugins: [asft]
         asft:
           direction: ./chat.asft.safetensors
    3. axolotl train config.yml
    """


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


@asft.command()
@click.option("--base", required=True, metavar="DIR|ID", help="The base model: a folder in safetensors, or owner/name.")
@click.option("--aligned", required=True, metavar="DIR|ID", help="The aligned (chat) model, likewise.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Direction file to write.")
@click.option(
    "--rank",
    default="64",
    show_default=True,
    callback=_rank,
    help="Directions a layer: a number, 'full', or 'auto' for the fewest within --tolerance.",
)
@click.option(
    "--tolerance", default=0.01, show_default=True, help="With --rank auto: error of the paper penalty per ||dW||^2."
)
@click.option(
    "--modules",
    multiple=True,
    metavar="REGEX",
    help="Only these modules; repeat for more.  [default: all linear layers]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the stored vectors.",
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
    default="harmful",
    show_default=True,
    metavar="SET",
    help="Which prompts --metric asks: the shipped set, a file, or owner/name of a Hub dataset.",
)
@click.option(
    "--metric-rank", default=256, show_default=True, type=click.IntRange(min=1), help="Directions a layer, at most."
)
@click.option(
    "--metric-energy",
    default=0.99,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="The fewest directions with this share of the metric; 1 keeps --metric-rank.",
)
@click.option("--load-in-4bit", is_flag=True, help="Load the aligned model in 4 bit for --metric, to save memory.")
@click.option("--seed", default=0, show_default=True, help="Of the randomised decomposition.")
@click.option("--device", default="cpu", show_default=True, help="Where the algebra runs: cpu or cuda.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def extract(
    output: Path,
    as_json: bool,
    force: bool,
    modules: tuple[str, ...],
    metric_names: tuple[str, ...],
    prompts: str,
    metric_rank: int,
    metric_energy: float,
    load_in_4bit: bool,
    **options: Any,
) -> None:
    """Make a direction file from a base model and its aligned model.

    Reads one pair of weights at a time: memory holds the largest pair, not the models. A model on the Hub that is not
    in its cache is read from there, tensor by tensor, and takes no disk; owner/name@revision pins it.

    \b
    Example:
      axolotl asft extract --base meta-llama/Llama-3.1-8B --aligned meta-llama/Llama-3.1-8B-Instruct \\
          --metric fisher -o llama3-8b.asft.safetensors
    """
    if output.suffix != ".safetensors":
        raise AsftError(f"--output is {output}; expected a name that ends in .safetensors")
    if output.exists() and not force:
        raise AsftError(f"{output} exists; give another --output, or --force to replace it")
    from axolotl_asft.extract import extract_direction
    from axolotl_asft.summary import summary, summary_table

    metrics = []
    if metric_names:
        from axolotl_asft.evaluation.safety_metrics import safety_metrics
        from axolotl_asft.hub import model_folder

        with stages(show=not as_json) as stage:
            metrics = safety_metrics(
                str(model_folder(options["aligned"])),
                metric_names,
                prompts,
                metric_rank,
                metric_energy,
                load_in_4bit=load_in_4bit,
                device=options["device"],
                stage=stage,
            )
    show = sys.stderr.isatty() and not as_json
    direction = extract_direction(modules=list(modules) or None, metrics=metrics, progress=show, **options)
    sha256 = direction.save(output)
    result = summary(direction, output, sha256)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(summary_table(result))
        click.echo(f"\nUse it:\n  plugins: [asft]\n  asft:\n    direction: {output}")


@asft.command()
@click.argument("file", metavar="FILE|OWNER/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--modules/--no-modules", default=True, help="List every module.  [default: --modules]")
def inspect(file: str, as_json: bool, modules: bool) -> None:
    """Show what a direction file holds: models, modules, ranks, captured energy, error bounds.

    \b
    Example:
      axolotl asft inspect chat.asft.safetensors
      axolotl asft inspect owner/name@revision
    """
    from axolotl_asft.direction import AlignmentDirection
    from axolotl_asft.hub import direction_path
    from axolotl_asft.summary import module_table, summary, summary_table

    path = direction_path(file)
    direction = AlignmentDirection.load(path)
    result = summary(direction, path, direction.sha256)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(summary_table(result))
    if modules:
        click.echo("\n" + module_table(result))


@asft.command()
@click.argument("first", metavar="FILE|OWNER/NAME")
@click.argument("second", metavar="FILE|OWNER/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--modules/--no-modules", default=True, help="List every module.  [default: --modules]")
def diff(first: str, second: str, as_json: bool, modules: bool) -> None:
    """Compare two directions: principal angles between their spans, layer by layer.

    Of two revisions of a model, of two ways to align it, or of a file that you were given and your own.

    \b
    Example:
      axolotl asft diff mine.asft.safetensors owner/name
    """
    from axolotl_asft.compare import compare, comparison_text
    from axolotl_asft.direction import AlignmentDirection

    result = compare(AlignmentDirection.load(first), AlignmentDirection.load(second))
    click.echo(json.dumps(result) if as_json else comparison_text(result, modules))


@asft.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("asft-demo"),
    show_default=True,
    help="Folder for everything the demo makes; an interrupted demo goes on there.",
)
@click.option("--seed", default=0, show_default=True, help="Of the data, the models and the training.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def demo(output: Path, seed: int, as_json: bool) -> None:
    """See the whole story on one CPU in minutes, offline.

    Makes a small base model, aligns it (it learns to refuse), extracts the alignment direction, fine-tunes the aligned
    model on a useful task with 10 % poison, once plain and once under the constraint, both through `axolotl train`
    with QLoRA, and prints what became of its safety.

    \b
    Example:
      axolotl asft demo --output my-demo
    """
    from axolotl_asft.demo.run import run_demo, table

    with stages(show=not as_json) as stage:
        result = run_demo(output, seed, stage)
    if as_json:
        click.echo((output / "results.json").read_text(), nl=False)
        return
    click.echo(f"\n{table(result)}\n")
    click.echo("harmfulness: held-out harmful prompts not refused. update norm: ||dW||.")
    click.echo(
        f"{result.seconds:.0f} seconds. Everything is in {output}/: plain.yml and asft.yml, models, logs, results."
    )


@asft.command()
@click.option("--adapter", required=True, metavar="DIR", help="Folder of the trained LoRA adapter; it is left alone.")
@click.option("--direction", "file", required=True, metavar="FILE|OWNER/NAME", help="Direction of its model.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the projected adapter."
)
@click.option("--threshold", type=float, metavar="COS", help="Project the layers with cos(C dW, dW) at most this.")
@click.option("--layers", type=int, metavar="N", help="Project the N layers of smallest cosine.")
@click.option(
    "--attenuate", type=float, metavar="F", help="B - F (I - C) B instead of C B: 0 leaves a layer, 1 projects it."
)
@click.option(
    "--projector", type=click.Choice(["paper", "normalized", "subspace"]), default="paper", show_default=True, help="C."
)
@click.option("--rank", type=int, metavar="K", help="Use only the leading K stored directions.")
@click.option("--on-uncovered", type=click.Choice(["error", "ignore"]), default="error", show_default=True)
@click.option(
    "--verify-model/--no-verify-model",
    default=True,
    show_default=True,
    help="Compare the direction with the adapter's base model, where that is a local folder.",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what became of every layer as JSON.")
def project(file: str, output: Path, as_json: bool, **options: Any) -> None:
    """Project a trained adapter towards the alignment direction: Safe LoRA, after the fact.

    For adapters that were trained without the constraint. Layers whose update points away from the direction get
    B <- C B (arXiv 2405.16833), or lose a part of what is orthogonal to it with --attenuate.

    \b
    Example:
      axolotl asft project --adapter out/ --direction chat.asft.safetensors --threshold 0.35 -o out-safe/
      axolotl asft project --adapter out/ --direction chat.asft.safetensors --attenuate 0.5 -o out-half/
    """
    quieten_libraries()
    from axolotl_asft.direction import AlignmentDirection
    from axolotl_asft.project import as_dict, project_adapter, summary_text

    report = project_adapter(direction=AlignmentDirection.load(file), output=output, **options)
    click.echo(json.dumps(as_dict(report)) if as_json else f"{summary_text(report)}\nwritten to {output}/")


@asft.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--name", default="direction.safetensors", show_default=True, help="Of the file there; a repository holds several."
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", metavar="ID", help="For the card: apache-2.0, llama3.1, ...  [default: other]")
@click.option("--message", default="Add an alignment direction", show_default=True, help="Of the commit.")
@click.option("--json", "as_json", is_flag=True, help="Print where it went as JSON.")
def push(file: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Share a direction file on the Hugging Face Hub, with a card that says what it is and how to use it.

    Log in first: `hf auth login`. The repository is made where there is none; a card of your own in it is left alone.

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


asft.add_command(evaluate_command)
asft.add_command(landscape_command)


def main() -> None:
    """Entry point of `python -m axolotl_asft`."""
    asft(prog_name="python -m axolotl_asft")
