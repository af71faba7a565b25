"""`axolotl asft ...`: the commands. Heavy modules are imported inside them, so that --help is quick."""

import json
from pathlib import Path
from typing import Any

import click

from axolotl_asft import __version__
from axolotl_asft.cli_configs import CONFIG_COMMANDS
from axolotl_asft.cli_directions import DIRECTION_COMMANDS
from axolotl_asft.cli_evidence import evaluate_command, landscape_command
from axolotl_asft.cli_report import report_command
from axolotl_asft.console import FilePath, OneLineErrors, quieten_libraries, stages


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="axolotl-asft")
def asft() -> None:
    """Keep a chat model's safety while you fine-tune it (AsFT, arXiv 2506.08473).

    \b
    1. axolotl asft extract --base BASE --aligned CHAT --metric fisher -o chat.asft.safetensors
    2. add to your config:
         plugins: [asft]
         asft:
           direction: ./chat.asft.safetensors
    3. axolotl asft check config.yml
    4. axolotl train config.yml
    """


@asft.command()
@click.option(
    "-o",
    "--output",
    type=FilePath(file_okay=False),
    default=Path("asft-demo"),
    show_default=True,
    help="Folder for everything the demo makes; an interrupted demo resumes there.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the data, the models and the training.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def demo(output: Path, seed: int, as_json: bool) -> None:
    """See the whole method at work on one CPU in minutes, offline.

    Makes a small base model, aligns it (it learns to refuse), extracts the alignment direction, fine-tunes the aligned
    model on a useful task with 10 % poison, once plain and once under the constraint, both through `axolotl train`
    with QLoRA, and prints how safe each result is.

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
@click.option("--adapter", required=True, metavar="DIR", help="Folder of the trained LoRA adapter; it is not changed.")
@click.option(
    "--direction", "file", required=True, metavar="FILE|OWNER/NAME", help="Alignment direction of its base model."
)
@click.option("-o", "--output", required=True, type=FilePath(), help="Folder for the projected adapter.")
@click.option("--threshold", type=float, metavar="COS", help="Project the layers whose cos(C dW, dW) is at most this.")
@click.option("--layers", type=int, metavar="N", help="Project the N layers with the smallest cosine.")
@click.option(
    "--attenuate",
    type=float,
    metavar="F",
    help="Use B - F (I - C) B instead of C B: F = 0 leaves a layer as it is, 1 projects it.",
)
@click.option(
    "--projector",
    type=click.Choice(["paper", "normalized", "subspace"]),
    default="paper",
    show_default=True,
    help="How the projector C is built.",
)
@click.option("--rank", type=int, metavar="K", help="Use only the leading K stored directions.")
@click.option(
    "--on-uncovered",
    type=click.Choice(["error", "warn", "ignore"]),
    default="error",
    show_default=True,
    help="What to do if the adapter holds a layer without a direction, or a tensor that is neither A nor B.",
)
@click.option(
    "--verify-model/--no-verify-model",
    default=True,
    show_default=True,
    help="Check that the direction matches the adapter's base model, if that is a local folder.",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done to every layer as JSON.")
def project(file: str, output: Path, as_json: bool, **options: Any) -> None:
    """Project a trained adapter towards the alignment direction: Safe LoRA, after training.

    For adapters that were trained without the constraint. Layers whose update points away from the direction get
    B <- C B (arXiv 2405.16833); with --attenuate they lose only a part of what is orthogonal to it.

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


for command in (*CONFIG_COMMANDS, *DIRECTION_COMMANDS, evaluate_command, landscape_command, report_command):
    asft.add_command(command)


def main() -> None:
    """Entry point of `python -m axolotl_asft`."""
    asft(prog_name="python -m axolotl_asft")
