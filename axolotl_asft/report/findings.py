"""What a run's numbers say, in sentences: the titles of the report."""

import math
from collections.abc import Callable, Sequence

from axolotl_asft.report.evaluation_results import Evaluation, Measure
from axolotl_asft.report.grid import Grid
from axolotl_asft.report.runs import Run

NBSP = "\u00a0"
MEASURED_BY = {
    "weights": "measured on the weights",
    "activations": "measured by what it does to the layers' outputs on safety prompts",
    "fisher": "measured by what it does to the model's own refusals",
}


def percent(share: float) -> str:
    """0.1234 -> 12 %, with a digit more where it is small."""
    value = 100 * share if abs(share) > 1e-9 else 0.0
    if value and abs(value) < 0.05:
        return f"under{NBSP}0.1{NBSP}%"
    return f"{value:.1f}{NBSP}%" if abs(value) < 9.95 and value else f"{value:.0f}{NBSP}%"


def multiple(value: float) -> str:
    """Below 1 a percentage, from there on a number of times."""
    return percent(value) if value < 0.995 else f"{number(value)}{NBSP}times"


def of_alignment(value: float) -> str:
    """12 % of what alignment, 1.5 times what alignment: to be followed by what alignment did."""
    return f"{multiple(value)} {'of ' if value < 0.995 else ''}what alignment"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where it can be read without."""
    if value is None or not math.isfinite(value):
        return "none"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}" if digits < 3 or abs(value) >= 0.1 else f"{value:.3g}"


def headline(run: Run) -> str:
    """The first line of the page."""
    if run.diverged_at is not None:
        return f"The training diverged: from step {run.diverged_at:,} on, the update is not finite"
    furthest, untouched = _largest(run, "asft/max_drift"), without_yardstick(run)
    if untouched and not furthest:
        return "The update moved only layers that alignment had not touched"
    if furthest is None:
        return "A run under the safety constraint"
    if furthest == 0 and run.last("asft/drift"):  # on the weights, whatever the metric
        return "The update moved nothing that alignment had moved"
    if furthest == 0:
        return "The update never left the alignment direction"
    last = run.last("asft/max_drift") or furthest
    verb = "stayed" if furthest <= 1.1 * last else "ended"
    touched = f", in the {len(run.layers) - untouched} of {len(run.layers)} layers that it touched" if untouched else ""
    return f"The update {verb} within {of_alignment(last)} moved{touched}"


def headline_note(run: Run, others: Sequence[Run] = ()) -> str:
    """What the headline compares, for readers who have not met it, and where other runs ended."""
    if run.diverged_at is not None:
        return (
            "Its numbers are no longer finite, and the adapter is unusable: train again, with a lower learning "
            "rate. The curves end before that step."
        )
    how = MEASURED_BY.get(str(run.constraint.get("metric")), "measured on the weights")
    worst = furthest_layer(run)
    where = f" Furthest at the end: {worst[0]}, {multiple(worst[1])}" if worst else ""
    peak, last = _largest(run, "asft/max_drift"), run.last("asft/max_drift")
    if where:
        where += f", after a peak of {multiple(peak)}." if peak and last and peak > 1.1 * last else "."
    if untouched := without_yardstick(run):
        where += f" Of {untouched} layers it is not known: alignment had not touched them, the run moved them."
    ended = {other.name: other.last("asft/max_drift") for other in others if not measured_otherwise(run, other)}
    against = "".join(f" In {name} it was {multiple(value)}." for name, value in ended.items() if value is not None)
    went = "went off the alignment direction" if has_free_directions(run) else "moved it"
    return f"In each layer, how far fine-tuning {went}, against how far alignment itself had; {how}.{where}{against}"


def has_free_directions(run: Run) -> bool:
    """Whether C is anything but 0: without free directions all of an update is off them."""
    return run.constraint.get("rank") != 0


def measured_otherwise(run: Run, other: Run) -> str:
    """What the other's drift was measured with that this run's was not, as "metric weights, not fisher"; else ""."""
    ours, theirs = run.constraint, other.constraint
    fields = ["direction_sha256", "metric", "rank"]
    if has_free_directions(run) or has_free_directions(other):
        fields.append("projector")  # without free directions it is 0 either way
    differing = [key for key in fields if key in ours and key in theirs and ours[key] != theirs[key]]
    words = {"direction_sha256": "another direction"}
    return ", ".join(words.get(key, f"{key} {_word(theirs[key])}, not {_word(ours[key])}") for key in differing)


def without_yardstick(run: Run) -> int:
    """Layers that the run moved and alignment had not: how far they went against it is not known."""
    if not run.snapshots:
        return 0
    last = run.snapshots[-1]["layers"]
    return sum(relative is None and bool(norm) for relative, norm in zip(last["relative"], last["norm"], strict=True))


def furthest_layer(run: Run) -> tuple[str, float] | None:
    """Name and relative drift of the layer that ended furthest off; None where that is not known."""
    if not run.snapshots or run.diverged_at is not None:
        return None
    pairs = zip(run.snapshots[-1]["layers"]["relative"], run.layers, strict=True)
    known = [(value, name) for value, name in pairs if value is not None]
    return (max(known)[1], max(known)[0]) if known else None


def curve_title(run: Run, key: str) -> str:
    """What the curve of a logged number says."""
    what, finding = CURVES[key]
    steps, values = run.curve(key)
    if run.diverged_at is not None:
        return f"{what}, until the training diverged in step {run.diverged_at:,}"
    return finding(run, steps, values) if values and finding is not None else what


def _loss(_: Run, steps: list[int], losses: list[float]) -> str:
    if len(losses) < 2:
        return "The loss of the task"
    last = losses[-1]
    verb = "fell" if last < 0.98 * losses[0] else "rose" if last > 1.02 * losses[0] else "hardly moved:"
    return f"The task's loss {verb} from {number(losses[0])} to {number(last)} in {steps[-1]:,} steps"


def _penalty(_: Run, steps: list[int], values: list[float]) -> str:
    peak = max(values)
    if not peak:
        return "No penalty was added"
    at = steps[values.index(peak)]
    if at == steps[-1]:
        return f"The penalty was still growing at the end, at {number(peak)}"
    return f"The penalty peaked at {number(peak)} in step {at:,} and ended at {number(values[-1])}"


def _anchor(_: Run, steps: list[int], values: list[float]) -> str:
    peak = max(values)
    if peak > 1.1 * values[-1]:
        return (
            f"Divergence from the aligned model's answers peaked at {number(peak)} nats/token in step "
            f"{steps[values.index(peak)]:,} and ended at {number(values[-1])}"
        )
    return f"Divergence from the aligned model's answers ended at {number(values[-1])} nats/token"


def _furthest(run: Run, _: list[int], values: list[float]) -> str:
    budget = run.constraint.get("max_drift")
    if isinstance(budget, int | float) and budget:
        return f"The furthest layer used {percent(values[-1] / budget)} of its budget"
    return f"The furthest layer ended at {of_alignment(values[-1])} moved it"


def _drift(_: Run, __: list[int], values: list[float]) -> str:
    return f"{percent(values[-1])} of the update's length is off the alignment direction"


def _norm(_: Run, __: list[int], values: list[float]) -> str:
    return f"The update grew to a norm of {number(values[-1])}"


# Of each curve: what it is, and what it says.
CURVES: dict[str, tuple[str, Callable[[Run, list[int], list[float]], str] | None]] = {
    "loss": ("The loss of the task", _loss),
    "asft/penalty": ("The penalty", _penalty),
    "asft/anchor_kl": ("The aligned model's own answers", _anchor),
    "asft/max_drift": ("The furthest layer", _furthest),
    "asft/update_norm": ("The norm of the update", _norm),
    "asft/drift": ("The share of the update off the direction", _drift),
    "learning_rate": ("The learning rate", None),
}


def heat_title(run: Run) -> str:
    """Where the update went, as the last snapshot has it."""
    last = run.snapshots[-1]
    if run.diverged_at is not None:
        return f"Layer by layer up to step {last['step']:,}, before the training diverged"
    grid = Grid.of(run.layers)
    best, place = 0.0, (0, 0)
    for row, cells in enumerate(grid.fill(last["layers"]["relative"])):
        for column, value in enumerate(cells):
            if value > best:
                best, place = value, (row, column)
    if best == 0:
        return "No layer that alignment touched has moved" if without_yardstick(run) else "No layer has moved yet"
    return f"Layer {grid.layers[place[1]]}'s {grid.kinds[place[0]]} ended furthest: {of_alignment(best)} moved"


def spectrum_title(run: Run) -> str:
    """How much of the whole update lies in the aligned subspace, against chance."""
    share, chance = total_share(run)
    if share is None or not chance:
        return "The singular values of the update"
    times = share / chance
    against = f"{number(times)} times what chance would put there"
    if 0.8 < times < 1.25:
        against = "about what chance would put there"
    return f"{percent(share)} of the update lies in the aligned subspace, {against}"


def total_share(run: Run) -> tuple[float | None, float]:
    """||U^T dW||^2 over ||dW||^2 of all layers, and the same of updates in random directions."""
    total = within = chance = 0.0
    for spectrum in run.spectra.values():
        if spectrum.inside:
            size = sum(value**2 for value in spectrum.values)
            total, within, chance = total + size, within + size * spectrum.share, chance + size * spectrum.chance
    return (within / total, chance / total) if total else (None, 0.0)


def measured(value: float, measure: Measure) -> str:
    """A share as a percentage, anything else as it is."""
    return percent(value) if measure.is_share else number(value)


def evaluation_title(evaluation: Evaluation) -> str:
    """The first measure of this run, against the model before and the others."""
    measure = evaluation.measures[0]
    words = {"before": "before", "this": "after this run"}
    shown = [
        f"{measured(point.value, measure)} {words.get(point.role, f'under {point.model}')}" for point in measure.points
    ]
    title = measure.title.partition(":")[0]
    return f"{title}: {', '.join(shown)}" if len(shown) < 5 else title


def _word(value: object) -> str:
    return "all" if value is None else str(value)


def _largest(run: Run, key: str) -> float | None:
    _, values = run.curve(key)
    return max(values, default=None)
