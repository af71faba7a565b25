"""A run's report on disk: the page, and its pictures beside it."""

from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text, writable_folder
from axolotl_asft.report.drawing import need_matplotlib
from axolotl_asft.report.gather import Report, gather
from axolotl_asft.report.runs import read_run
from axolotl_asft.stamp import PAGE, PICTURE

REPORT_FILE = PAGE


def write_report(folder: str | Path, output: str | Path | None = None, **sources: Any) -> tuple[Report, list[Path]]:
    """Draw a run: one HTML page, and PNGs of its name beside it.

    Args:
        folder: the output_dir of a run under the constraint.
        output: the page; default: asft_report.html in the run's folder.
        sources: as for `gather`: compare, evaluation, direction.

    Returns:
        What was gathered, and the files that were written, the page first.

    Raises:
        AsftError: no such run, a damaged file, nothing can be written there, or matplotlib is missing.
    """
    need_matplotlib("the report")
    folder = Path(folder)
    report = gather(folder, **sources)
    output = Path(output) if output is not None else folder / REPORT_FILE
    if output.suffix.lower() not in (".html", ".htm"):
        raise AsftError(f"--output is {output}; expected a name that ends in .html")
    if output.is_dir():
        raise AsftError(f"--output {output} is a folder; give a file name in it")
    writable_folder(output.parent)
    from axolotl_asft.report.figures import training_panels
    from axolotl_asft.report.page import page
    from axolotl_asft.report.pictures import heat_png, spectrum_png, training_png

    run = report.run
    files = [output]
    atomic_write_text(output, page(report))
    if training_panels([run, *report.others]):
        files.append(output.with_name(f"{output.stem}_training.png"))
        training_png([run, *report.others], files[-1])
    if run.snapshots:
        files.append(output.with_name(f"{output.stem}_layers.png"))
        heat_png(run, files[-1])
    if any(any(spectrum.values) for spectrum in run.spectra.values()):
        files.append(output.with_name(f"{output.stem}_spectrum.png"))
        spectrum_png(run, files[-1])
    return report, files


def draw_training_picture(folder: str | Path) -> None:
    """The picture for the model card, from the history alone; none where there is nothing to draw."""
    need_matplotlib("the report")
    from axolotl_asft.report.figures import training_panels
    from axolotl_asft.report.pictures import training_png

    runs = [read_run(Path(folder), "this run", constrained=True)]
    if training_panels(runs):
        training_png(runs, Path(folder) / PICTURE)
