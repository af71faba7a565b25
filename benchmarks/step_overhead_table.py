"""results/step_overhead.md and .png from results/step_overhead.json."""

import json
from pathlib import Path
from typing import Any

from axolotl_asft.files import atomic_write_text
from axolotl_asft.layer_groups import TEMPORARY_BYTES, TEMPORARY_BYTES_ON_GPU

Line = dict[str, Any]


def write_table(results: Path) -> None:
    """Every section that was measured, on every kind of device; the picture is of growth on the first."""
    lines = json.loads(results.read_text())
    parts = [
        "# What the constraint costs",
        "`python -m benchmarks.step_overhead`, which says what is measured and how.",
    ]
    for device in dict.fromkeys(line["device"] for line in lines):
        mine = [line for line in lines if line["device"] == device]
        machines = sorted({line["machine"] for line in mine})
        days = sorted({line["made"] for line in mine})
        parts.append(f"## On {device}: {'; '.join(machines)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}")
        mine = [line | {"what": line["what"] + _on_which(line, mine)} for line in mine]
        for part, heading, table in SECTIONS:
            if found := [line for line in mine if line["part"] == part]:
                parts += [heading, *table(found)]
    atomic_write_text(results.with_suffix(".md"), "\n\n".join(parts) + "\n")
    draw([line for line in lines if line["part"] == "growth"], results.with_suffix(".png"))
    print(f"wrote {results.with_suffix('.md')}")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _mb(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def _on_which(line: Line, lines: list[Line]) -> str:
    """The machine, where there are several; and of layers taken in other groups than now, by how much at a time."""
    several = len({other["machine"] for other in lines}) > 1
    now = TEMPORARY_BYTES_ON_GPU if line["device"] == "cuda" else TEMPORARY_BYTES
    of = line.get("groups of", now)
    groups = f", in groups of {of >> 20} MB" if of != now else ""
    return (f", {line['machine'].split(', ')[1]}" if several else "") + groups


def _steps(lines: list[Line]) -> list[str]:
    measured = [key for key in ("peak without", "kept", "extra peak") if key in lines[0]]  # on a GPU
    rows = [
        (line["what"], _ms(line["step"]), _ms(line["added"]), _penalty(line), f"{line['share']:.2%}",
         *(_mb(max(0, line[key])) for key in measured))
        for line in lines
    ]  # fmt: skip
    note = (
        "Constrained and unconstrained steps take turns in one run of axolotl; medians. Added: the time of the "
        "penalty's gradient, and of the anchor's forward and backward passes over 8 answers; the share, of all that is "
        "added, is of an unconstrained step. On a CPU: LoRA in fp32, 4 x 512 tokens a step (in 4 bit the step is "
        "slower, and the share smaller). On a GPU: QLoRA in NF4, micro-batches of 2048 tokens, gradient checkpointing; "
        "the most memory that torch had handed out in an unconstrained step, less what the constraint keeps there all "
        "the time, then that, and how much higher a constrained step's peak is than an unconstrained one's beside it."
    )
    head = (
        "model",
        "step without",
        "added",
        "of it the penalty",
        "share of the step",
        *(f"memory: {key}" for key in measured),
    )
    return [note, _table(head, rows)]


def _penalty(line: Line) -> str:
    """All that is added where nothing is asked; of an anchored step it is known where both were timed."""
    if "penalty" not in line and ", and the anchor" in line["what"]:
        return ""
    return _ms(line.get("penalty", line["added"]))


def _alone(lines: list[Line]) -> list[str]:
    times = [
        (line["what"],
         *(_ms(line[way]) for way in ("ours", "one layer at a time", "naive, factored", "literal")),
         f"{line['ratio']:,.0f}")
        for line in lines
    ]  # fmt: skip
    costs = [
        (line["what"], f"{line['launches']:,}", f"{line['launches one by one']:,}", str(line["waits"]),
         *(_mb(line[what]) for what in ("temporaries", "literal temporaries", "stored", "literal stored")))
        for line in lines
    ]  # fmt: skip
    return [
        "Value and gradient, r = 16, k = 64; medians of calls in turns. Literal: the authors' formula, out x out times "
        "out x in. Naive: the factored projector, but dW written out.",
        _table(("penalty of", "ours", "one layer at a time", "naive, factored", "literal", "literal / ours"), times),
        "Counted: operations launched, times that the host waits for the device, bytes.",
        _table(
            ("penalty of", "launches", "one layer at a time", "waits", "temporaries", "literal's", "kept", "literal's"),
            costs,
        ),
    ]


def _memory(lines: list[Line]) -> list[str]:
    rows = [
        (line["what"], _mb(line["stored"]), _mb(line["temporaries"]), f"{line['launches']:,}",
         f"{line['measured layers']} of {line['layers']}")
        for line in lines
    ]  # fmt: skip
    return [
        "Kept on the device in bf16, for all linear layers; temporaries of one call with r = 16. From as many decoder "
        "layers as the last column says; what is kept and the launches are multiplied up. A metric with 256 columns on "
        "both sides of every layer is the most that `extract` makes by default; it keeps fewer where they hold 99 %.",
        _table(("model", "kept", "temporaries", "launches", "decoder layers measured"), rows),
    ]


def _groups(lines: list[Line]) -> list[str]:
    rows = [
        (line["what"], _ms(line["seconds"]), _mb(line["temporaries"]), str(line["groups"])) for line in lines
    ]  # fmt: skip
    return [
        "Layers of one shape are taken together, as many as a group's temporaries may take: "
        f"{TEMPORARY_BYTES >> 20} MB on a CPU, {TEMPORARY_BYTES_ON_GPU >> 20} MB on a GPU, where launches cost "
        "more than arithmetic, and the backward pass has just freed more. Value and gradient; medians of calls in "
        "turns.",
        _table(("penalty of, and a group may take", "time", "temporaries", "groups"), rows),
        *dict.fromkeys(line["note"] for line in lines if "note" in line),
    ]


def _startup(lines: list[Line]) -> list[str]:
    found = {line["what"]: line for line in lines}
    help_, file = found["axolotl asft --help"], found["7B direction file"]
    rows = [
        ("`import axolotl_asft`, without torch", f"{found['import axolotl_asft']['milliseconds']:.2g} ms"),
        ("`axolotl asft --help` beyond `axolotl --help`", _ms(max(0.0, help_["ours"] - help_["axolotl's"]))),
        (f"reading and checking a direction file of {_mb(file['bytes'])}", _ms(file["load"])),
        ("putting it on 224 layers", _ms(file["build"])),
    ]
    return [_table(("at the start", "time"), rows)]


def _growth(lines: list[Line]) -> list[str]:
    return [
        "![Time and memory of one penalty over layers, width, r and k](step_overhead.png)",
        "One of them at a time, the others at 8 layers, width 1024, r = 16, k = 64. The line is the design's model, "
        "sum of (out (k + r) + in r) r, through the middle point.",
        _table(
            ("at", "time", "temporaries", "kept", "launches"),
            [
                (
                    line["what"],
                    _ms(line["seconds"]),
                    _mb(line["temporaries"]),
                    _mb(line["stored"]),
                    str(line["launches"]),
                )
                for line in lines
            ],
        ),
    ]


SECTIONS = (
    ("step", "### One optimizer step", _steps),
    ("penalty", "### The penalty alone", _alone),
    ("groups", "### Layers at a time", _groups),
    ("memory", "### Memory", _memory),
    ("startup", "### The start of a run", _startup),
    ("growth", "### How it grows", _growth),
)


def draw(lines: list[Line], path: Path) -> None:
    """Four panels of time and memory, with the design's model beside the time."""
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if line["device"] == lines[0]["device"]]
    overs = list(dict.fromkeys(line["over"] for line in lines))
    figure, axes = pyplot.subplots(1, len(overs), figsize=(12, 3.4), sharey=True, layout="constrained")
    middle = {"layers": 8, "width": 1024, "r": 16, "k": 64}
    for axis, over in zip(axes, overs, strict=True):
        mine = [line for line in lines if line["over"] == over]
        at = [line["at"] for line in mine]
        centre = next(line for line in mine if line["at"] == middle[over])
        model = [centre["seconds"] * line["model"] / centre["model"] for line in mine]
        axis.plot(at, [line["seconds"] * 1e3 for line in mine], "o-", color="#2a6f97", label="time, ms")
        axis.plot(at, [seconds * 1e3 for seconds in model], "--", color="#8a8a8a", label="the model's operations")
        axis.plot(at, [line["temporaries"] / 1e6 for line in mine], "s:", color="#c8553d", label="temporaries, MB")
        axis.set(xscale="log", yscale="log", xlabel=over, xticks=at)
        axis.set_xticks(at, [str(value) for value in at])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("One penalty: time and temporaries", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
