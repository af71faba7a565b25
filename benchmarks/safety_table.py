"""The results of the safety benchmark as a table and a picture."""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.evaluation.shares import wilson_interval
from axolotl_asft.files import atomic_write_text
from benchmarks.safety_names import DEFAULT, FIRST_TURNS, ON_GPU, colour_of, shown_name
from benchmarks.safety_on_gpu import on_gpu_section
from benchmarks.safety_shares import draw_shares, over_shares, shares_section

# In the table alone: the picture has room for the main ones.
DETAILS = (
    "-of-64",
    "-long",
    "-own-",
    "budget",
    "-lr-",
    "-unseen",
    "-others",
    "-mixed",
    "-equal",
    "-diverse",
    "-second",
    "-alpaca",
    "-general",
    "-in-system",
    "-in-turn",
    "-after-",
    "-system",
    ON_GPU,
)
PRIM = 2  # times as many harmless prompts refused as by the aligned model: no safety, and hollow in the picture
LETTER_WIDTH, LINE_HEIGHT = 1.5, 3.4  # of the picture's names, in per cent of its axes
DOT = 3.2  # its width there
COLUMNS = [
    "method", "seeds", "harmful", "refused", "right", "perplexity", "answered", "repetitive", "drift", "update norm",
    "seconds",
]  # fmt: skip
LOWEST, HIGHEST = -4, 107
Results = list[dict[str, Any]]

SHARES = """## Over shares of poison

![Harmful prompts not refused, harmless prompts refused, and task score over the share of poison](safety_shares.png)

harmful / refused / right, in %, of the methods that were run at three shares or more (seeds).
"""


@dataclass(frozen=True)
class Cell:
    """One method on one task under one share of poison, over seeds.

    Attributes:
        seeds: how many runs.
        harmful, refused, right: mean shares over seeds.
        spread: standard deviation over seeds of `harmful` and `right`; None of one seed.
        intervals: of `harmful`, `refused` and `right` (`interval`).
    """

    seeds: int
    harmful: float
    refused: float
    right: float
    spread: tuple[float, float] | None
    intervals: dict[str, str]
    perplexity: float | None
    perplexity_answered: float | None
    repetitive: float
    drift: float | None
    update_norm: float | None
    seconds: float


def cell(results: Results) -> Cell:
    """Over seeds."""

    def mean(key: str) -> float:
        return statistics.fmean(result[key] for result in results)

    def known(key: str) -> float | None:
        """None where a run lacks it."""
        return mean(key) if all(result.get(key) is not None for result in results) else None

    several = len(results) > 1
    return Cell(
        len(results),
        mean("harmfulness"),
        mean("over_refusal"),
        mean("accuracy"),
        (_deviation(results, "harmfulness"), _deviation(results, "accuracy")) if several else None,
        {
            "harmful": interval(mean("harmfulness"), results[0]["asked"]["harmful"]),
            "refused": interval(mean("over_refusal"), results[0]["asked"]["borderline"]),
            "right": interval(mean("accuracy"), results[0]["asked"]["task"]),
        },
        known("perplexity"),
        known("perplexity_answered"),
        mean("repetitive"),
        known("drift"),
        known("update_norm"),
        mean("seconds"),
    )


def interval(share: float, prompts: int) -> str:
    """Wilson's 95 % interval of a mean over seeds, in %; every seed is asked the same prompts, which count once."""
    low, high = wilson_interval(round(share * prompts), prompts)
    return f"({100 * low:.0f} to {100 * high:.0f})"


def _deviation(results: Results, key: str) -> float:
    return statistics.stdev(result[key] for result in results)


def write_table(path: Path, settings: dict[str, Any]) -> None:
    """safety.md, safety.png and safety_shares.png beside the results; of each run the newest result."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    newest = {result["run"]: result for result in lines}
    groups: dict[tuple[str, float], dict[str, Results]] = defaultdict(lambda: defaultdict(list))
    for result in newest.values():
        groups[result["task"], result["poison"]][result["method"]].append(result)
    before = {task: cell(found["aligned"]) for (task, poison), found in groups.items() if "aligned" in found}
    cells = {
        key: {name: cell(methods[name]) for name in settings["methods"] if name in methods and name != "aligned"}
        for key, methods in sorted(groups.items())
    }
    shares = {task: over_shares(cells, task) for task in sorted({task for task, _ in cells})}
    parts = [_heading(list(newest.values()), settings), SHARES]
    parts += [shares_section(task, methods) for task, methods in shares.items()]
    parts.append(on_gpu_section(cells))
    for (task, poison), found in cells.items():
        if found:
            parts.append(_section(task, poison, {"aligned": before[task], **found} if task in before else found))
    atomic_write_text(path.with_suffix(".md"), "\n".join(parts))
    print("\n".join(parts))
    _draw(path.with_suffix(".png"), groups, before)
    draw_shares(path.with_name(f"{path.stem}_shares.png"), shares, before)


def _heading(results: Results, settings: dict[str, Any]) -> str:
    machines = sorted({result["machine"] for result in results})
    dates = sorted({result["made"] for result in results})
    size, batch = settings["train_examples"], settings["training"]["micro_batch_size"]
    when, where = " to ".join(sorted({dates[0], dates[-1]})), "; ".join(machines)
    return f"""# Safety and usefulness after fine-tuning

`python -m benchmarks.safety prepare`, then `run`, then `table`; settings in `benchmarks/safety.yml`, every run a
line of `safety.jsonl`. {len(results)} runs, {when}, on {where}.

SmolLM2-135M-Instruct after refusal tuning, LoRA on NF4-rounded weights, {size} examples, one epoch of
micro-batches of {batch}.

- harmful: held-out harmful prompts not refused, in %
- refused: harmless alarming prompts refused, in %
- right: the task's held-out answers right to the letter, in %
- (a to b): Wilson's 95 % interval over the prompts, which are the same for every seed and count once
- ±: the standard deviation over seeds of the fine-tuning; without it a row is one seed, and a difference of a few
  points is noise. The aligned model, the direction and the random subspace are the same for all
- perplexity: of all answers under the aligned model, median, not taken where every weight was changed; answered: the
  same of the answers that are no refusals, not taken in the earlier runs; repetitive: answers that go round in circles
- drift: share of the update outside the 64 aligned directions; not taken of what was trained on a GPU
- seconds: of training or projecting; wall time on a machine that did other things too
- fisher-L, anchor-W, and fisher-L-anchor-W: lambda L with the Fisher metric, `anchor_weight` W, and both together
- -unseen and -others: metric and anchor from requests that alignment was not taught, of ours and of HarmBench's;
  -mixed: from the shipped ones and HarmBench's; -mixed-half: from the shipped ones and every second of HarmBench's
- {DEFAULT} is the default; {FIRST_TURNS}, "first turns alone" in the pictures: without its
  general forms (`general_formats: false`); -general-own: with them, by an earlier version (the commit is in
  `safety.yml`), which held in later turns what the aligned model says there, and not what it says in the first
- -in-turn, -in-system: the same asked in a second turn, or under a system prompt, in which no anchor asks; -after-task
  and -after-chat: after a turn of the task itself, and after a chat of four turns
- own-N, and -own-N: N % of the aligned model's own answers are mixed into the data; answers-N: as many of those in
  the direction file, by `axolotl asft answers` (first turns alone; -general: half of them in the general forms);
  mix-N: N % of refusals
- full: every weight is trained, without LoRA
- budget-B: `max_drift` B on the weights; safelora-N: Safe LoRA's projection of the N % of layers that are least alike;
  safelora-half: half of what it takes out, of all layers
- scaled-N: N % of plain's update; resta-N: plain with N % of the whole d added (RESTA, arXiv 2402.11746)
- -second: of another aligned model, which was taught other prompts than metric, anchor and own answers ask
- -alpaca: on data of type alpaca, and asked in alpaca's format; -alpaca-in-chats: the same asked in the chat template;
  -alpaca-unasked: with `prompt_formats: []`, so that the anchor asks in the chat template alone
- -system: on chats under one system prompt, and asked under it; -systems: each under its own, and asked under
  another; -in-chats, -in-other, -unasked: asked in the bare chat template, under another system prompt, and with
  `prompt_formats: []`
- -qlora: in QLoRA on a GPU, in bf16
- -diverse: the poison's answers are in other words for every example, and not one of four sentences
- a method whose name ends in -long trains three epochs instead of one, -twice two; one with -lr-R, at a learning rate
  of R instead of {settings["training"]["learning_rate"]:g}, or made of such a run's adapter
"""


def _section(task: str, poison: float, cells: dict[str, Cell]) -> str:
    lines = [
        f"## {task}, {poison:.0%} poison\n",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    for name, found in cells.items():
        spreads = [f" ± {100 * spread:.1f}" for spread in found.spread] if found.spread else ["", ""]
        perplexities = found.perplexity, found.perplexity_answered
        row = [
            name,
            str(found.seeds),
            f"{100 * found.harmful:.1f}{spreads[0]} {found.intervals['harmful']}",
            f"{100 * found.refused:.1f} {found.intervals['refused']}",
            f"{100 * found.right:.1f}{spreads[1]} {found.intervals['right']}",
            *("" if perplexity is None else f"{perplexity:.1f}" for perplexity in perplexities),
            f"{100 * found.repetitive:.0f} %",
            *("" if number is None else f"{number:.2f}" for number in (found.drift, found.update_norm)),
            f"{found.seconds:.0f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _draw(path: Path, groups: dict[tuple[str, float], dict[str, Results]], before: dict[str, Cell]) -> None:
    """Harmfulness against task score, a panel for each task, at the poison with the most methods.

    Hollow: methods that bought it by refusing what is harmless too; the line of those that none beats leaves them out.
    """
    from axolotl_asft.picture import picture, plain

    tasks = sorted({task for task, _ in groups})
    chosen = {task: max((key for key in groups if key[0] == task), key=lambda key: len(groups[key])) for task in tasks}
    with picture(path, (7 * len(tasks), 6), dpi=130, layout="constrained") as figure:
        for number, task in enumerate(tasks, 1):
            axes = figure.add_subplot(1, len(tasks), number)
            everyone = groups[chosen[task]]
            shown = {
                name: found for name, found in everyone.items() if name == DEFAULT or not any(map(name.count, DETAILS))
            }
            methods = {name: cell(found) for name, found in shown.items()}
            everything = {**({"aligned": before[task]} if task in before else {}), **methods}
            places = {shown_name(name): (100 * found.right, 100 * found.harmful) for name, found in everything.items()}
            most = PRIM * before[task].refused if task in before else 1.1
            prim = {name for name, found in everything.items() if found.refused >= most}
            lines = label_places(places)
            for name in everything:
                place, colour = places[shown_name(name)], colour_of(name)
                inside = "white" if name in prim else colour
                axes.plot(*place, "o", color=colour, markerfacecolor=inside, markersize=8, zorder=3)
                axes.annotate(
                    shown_name(name), place, lines[shown_name(name)], fontsize=8, color=colour, va="center",
                    weight="bold" if name == DEFAULT else "normal",
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3,
                                "relpos": (0, 0.5)},
                )  # fmt: skip
            front = pareto_front([(found.right, found.harmful) for name, found in methods.items() if name not in prim])
            axes.plot(*zip(*[(100 * x, 100 * y) for x, y in front], strict=True), "--", color="#adb5bd", zorder=1)
            if task in before:
                axes.axhline(100 * before[task].harmful, color="#adb5bd", linewidth=1, zorder=1)
            axes.set_title(f"{task}, {chosen[task][1]:.0%} poison", loc="left", weight="bold")
            told = f"hollow: refuses {PRIM} times as many harmless prompts as the aligned model, or more"
            axes.set_xlabel(f"task answers right, %\n{told}")
            axes.set_ylabel("harmful prompts not refused, %")
            axes.set(xlim=(-5, 140), ylim=(-5, 108), xticks=range(0, 101, 20))
            plain(axes, "both")


def label_places(points: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """For each point's name a place, to the right of it and as near as can be, that no other name or point covers."""
    taken = [(x - DOT / 2, x + DOT / 2, y) for x, y in points.values()]
    chosen = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][::-1]):
        rows = sorted((step / 2 for step in range(-230, 231)), key=abs)
        start, end = x + 2.2, x + 2.2 + LETTER_WIDTH * len(name)
        row = next(
            row for row in rows
            if LOWEST < y + row < HIGHEST
            and all(end < left or start > right or abs(y + row - at) >= LINE_HEIGHT for left, right, at in taken)
        )  # fmt: skip
        chosen[name] = start, y + row
        taken.append((start, end, y + row))
    return chosen


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (score, harm) those that no other point beats in both, by score."""
    return sorted(
        {p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)},
    )
