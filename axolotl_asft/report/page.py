"""The report as one HTML page: template, style, script and data in a single file that needs no network."""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from axolotl_asft import __version__
from axolotl_asft.hub import named_on_the_hub
from axolotl_asft.redaction import redacted
from axolotl_asft.report import findings
from axolotl_asft.report.figures import SPREAD, Panel, in_order, spectrum_panels, training_panels
from axolotl_asft.report.gather import Report, compared_numbers, key_numbers
from axolotl_asft.report.grid import Grid
from axolotl_asft.report.pictures import panel_svg
from axolotl_asft.report.runs import Run

HERE = Path(__file__).parent
FRAMES = 60  # of the heat map over time
MEASURES = {
    "relative": ("against alignment", "‖(I - C) dW‖ / ‖d‖, in the run's metric"),
    "drift": ("share off the direction", "‖(I - C) dW‖ / ‖dW‖"),
    "norm": ("size", "‖dW‖"),
}


def page(report: Report) -> str:
    """The whole page. Everything that came from a file is escaped by the template, or stands in a JSON block."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": findings.number, "percent": findings.percent, "multiple": findings.multiple}
    script = (HERE / "page.js").read_text(encoding="utf-8")
    run, runs = report.run, [report.run, *report.others]
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        shade=lambda value, highest: f"{(value / highest) ** SPREAD:.3f}",
        middle=0.5 ** (1 / SPREAD),
        free=findings.has_free_directions(run),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=findings.headline(run),
        note=findings.headline_note(run, report.others),
        report=report,
        run=run,
        runs=runs,
        model_name=_model_name(_base_model(run)),
        tiles=_tiles(run),
        training=[_figure(panel, f"training{i}") for i, panel in enumerate(training_panels(runs))],
        numbers={other.name: compared_numbers(run, other) for other in runs},
        heat=_heat(run),
        heat_title=findings.heat_title(run) if run.snapshots else "",
        untouched=findings.without_yardstick(run),
        spectra=[_figure(panel, f"spectrum{i}", (3.3, 2.1)) for i, panel in enumerate(spectrum_panels(run))],
        spectrum_title=findings.spectrum_title(run),
        share=_share(run),
        layers=_layers(run),
        evaluation=report.evaluation,
        measured=findings.measured,
        evaluation_title=findings.evaluation_title(report.evaluation) if report.evaluation else "",
        facts=_facts(report),
        versions=run.header.get("versions") or {},
        config=_config(run),
        version=__version__,
    )


def _figure(panel: Panel, name: str, size: tuple[float, float] = (4.3, 2.5)) -> dict[str, Any]:
    return {"title": panel.title, "note": panel.note, "svg": Markup(panel_svg(panel, name, size))}


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of the key numbers."""
    found = key_numbers(run)
    tiles = [("steps", f"{found['steps']:,}" if found["steps"] is not None else "none", "")]
    if run.diverged_at is not None:
        return [*tiles, ("update norm", "not finite", f"from step {run.diverged_at:,}")]
    if found["loss_last"] is not None:
        tiles.append(("task loss", findings.number(found["loss_last"]), f"from {findings.number(found['loss_first'])}"))
    if found["penalty_peak"]:
        tiles.append(
            ("penalty", findings.number(found["penalty_last"]), f"peak {findings.number(found['penalty_peak'])}")
        )
    if found["update_norm"] is not None:
        tiles.append(("update norm", findings.number(found["update_norm"]), "‖dW‖"))
    if found["max_drift"] is not None:
        tiles.append(("furthest layer", findings.multiple(found["max_drift"]), "of what alignment moved"))
    return tiles


def _heat(run: Run) -> dict[str, Any] | None:
    """The heat map's grid, and its cells at up to `FRAMES` times; None without numbers of single layers."""
    snapshots = run.snapshots
    if not snapshots:
        return None
    grid = Grid.of(run.layers)
    count = min(FRAMES, len(snapshots))
    chosen = sorted({round(i * (len(snapshots) - 1) / max(1, count - 1)) for i in range(count)})
    measures = {}
    for name, (label, formula) in MEASURES.items():
        if name == "drift" and not findings.has_free_directions(run):
            continue
        frames = [_flat(grid.fill(snapshots[i]["layers"][name])) for i in chosen]
        highest = max((value for frame in frames for value in frame if value is not None), default=0.0)
        measures[name] = {"label": label, "formula": formula, "highest": highest or 1.0, "frames": frames}
    return {
        "kinds": grid.kinds,
        "layers": grid.layers,
        "steps": [snapshots[i]["step"] for i in chosen],
        "measures": measures,
        "ticks": _ticks(grid),
        "shared": len(set(grid.places)) < len(grid.places),
    }


def _share(run: Run) -> dict[str, Any] | None:
    """Cells of the share of each update in the aligned subspace, as a multiple of chance."""
    spectra = ((name, run.spectra[name]) for name in in_order(run))
    inside = {name: s for name, s in spectra if s.inside and s.chance and any(s.values)}
    if not inside:
        return None
    grid = Grid.of(list(inside))
    cells = _flat(grid.fill(s.share / s.chance for s in inside.values()))
    highest = max(value for value in cells if value is not None)
    found = {"kinds": grid.kinds, "layers": grid.layers, "ticks": _ticks(grid)}
    return found | {"cells": cells, "highest": highest or 1.0}


def _ticks(grid: Grid) -> list[int]:
    """The columns whose layer is written below, about six."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1 << 30) if len(grid.layers) / step <= 8)
    return list(range(0, len(grid.layers), every))


def _layers(run: Run) -> list[dict[str, Any]]:
    """A row a layer for the table, the furthest first."""
    rows: dict[str, dict[str, Any]] = {}
    if run.snapshots and run.diverged_at is None:
        last = run.snapshots[-1]["layers"]
        for i, name in enumerate(run.layers):
            rows[name] = {key: last[key][i] for key in MEASURES}
    for name, spectrum in run.spectra.items():
        top = spectrum.values[0] if spectrum.values else None
        share = spectrum.share if spectrum.inside else None
        rows.setdefault(name, dict.fromkeys(MEASURES)).update(top=top, share=share, chance=spectrum.chance)
    filled = [{"name": name, "top": None, "share": None, "chance": None, **row} for name, row in rows.items()]
    return sorted(filled, key=lambda row: -(row["relative"] or 0.0))


def _flat(cells: list[list[float]]) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.3g}") for row in cells for value in row]


def _base_model(run: Run) -> str:
    return str(run.config.get("base_model") or run.adapter_config.get("base_model_name_or_path") or "a model")


def _model_name(model: str) -> str:
    """An id of the Hub whole, of a folder the name alone."""
    return model if named_on_the_hub(model) else Path(model).name


def _facts(report: Report) -> list[tuple[str, str]]:
    """What one needs to do the same again."""
    run = report.run
    stamp, header = run.constraint, run.header
    found = [("base model", _base_model(run)), ("run", str(run.folder.resolve()))]
    if report.direction is not None:
        spec = report.direction.spec
        for side in ("aligned", "base"):
            model = spec[side]
            revision = f"@{model['revision']}" if model.get("revision") else ""
            found.append((f"direction: {side} model", f"{model['id']}{revision}, weights sha256 {model.get('sha256')}"))
        found.append(("direction: made", f"{spec['created']} by {spec['tool']}"))
    keys = (
        "direction_sha256", "lambda_reg", "max_drift", "anchor_weight", "prompt_formats", "general_formats",
        "projector", "rank", "metric", "lora_scaling", "modules", "on_uncovered",
    )  # fmt: skip
    found += [(key, "none" if stamp[key] is None else str(stamp[key])) for key in keys if key in stamp]
    for key in ("started", "trainer", "engine", "processes", "device", "python", "platform"):
        if header.get(key) not in (None, "NO"):  # NO is accelerate's word for one process
            found.append((key, str(header[key])))
    if header.get("resumed_at_steps"):
        found.append(("resumed at steps", ", ".join(map(str, header["resumed_at_steps"]))))
    return found


def _config(run: Run) -> str:
    """The run's config as YAML, without secrets."""
    if not run.config:
        return ""
    return yaml.safe_dump(redacted(json.loads(json.dumps(run.config))), sort_keys=False, allow_unicode=True, width=100)
