"""`axolotl asft report`: a run, drawn. Heavy modules are imported inside it."""

import json
from pathlib import Path

import click

from axolotl_asft.console import FilePath, quieten_libraries
from axolotl_asft.errors import AsftError
from axolotl_asft.files import named_folder


@click.command("report")
@click.argument("run_dir", type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="HTML file to write.  [default: RUN_DIR/asft_report.html]")
@click.option(
    "--compare",
    multiple=True,
    metavar="NAME=DIR",
    help="Another run to compare with, as plain=out/plain; repeat for more.",
)
@click.option(
    "--eval",
    "evaluation",
    type=FilePath(),
    metavar="FILE|DIR",
    help="Results of axolotl asft eval.  [default: asft-eval/ or eval/ in RUN_DIR]",
)
@click.option("--direction", metavar="FILE|OWNER/NAME", help="The run's direction file.  [default: as its config says]")
@click.option("--json", "as_json", is_flag=True, help="Print the key numbers and the files as JSON.")
def report_command(
    run_dir: Path,
    output: Path | None,
    compare: tuple[str, ...],
    evaluation: Path | None,
    direction: str | None,
    as_json: bool,
) -> None:
    """Draw a run: one HTML page that needs no network, and PNG files beside it.

    Loss and penalty over the steps, how far each layer went off the alignment direction over time, the singular values
    of the update against the aligned subspace, what `axolotl asft eval` found, and what is needed to reproduce the run.
    RUN_DIR is the output_dir of a run under the constraint, finished or still training. For a run to compare with:
    axolotl train config.yml --asft.lambda_reg 0 --asft.anchor_weight 0 --output-dir out/plain.

    \b
    Example:
      axolotl asft report out/
      axolotl asft report out/asft --compare plain=out/plain --eval asft-eval/ -o report.html
    """
    quieten_libraries()
    from axolotl_asft.report.findings import headline
    from axolotl_asft.report.write import write_report

    report, files = write_report(run_dir, output, compare=_named(compare), evaluation=evaluation, direction=direction)
    if as_json:
        click.echo(json.dumps({"files": [str(file) for file in files], **report.summary()}))
        return
    click.echo(f"{headline(report.run)}.".replace("\u00a0", " "))
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"written to {files[0]}" + (f", with {len(files) - 1} pictures beside it" if files[1:] else ""))


def _named(pairs: tuple[str, ...]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for pair in pairs:
        name, folder = named_folder("--compare", pair)
        if name in named or name == "this run":
            raise AsftError(f"--compare names {name!r} twice; give each run a name of its own")
        named[name] = folder
    return named
