"""What fine-tuning does to safety and usefulness, method by method: SmolLM2-135M, two tasks, poison, seeds.

    python -m benchmarks.safety prepare          # base, aligned model, direction: about ten minutes, once
    python -m benchmarks.safety run              # every run of the plan that is not there yet; hours
    python -m benchmarks.safety run --only 'generation/0.1/plain/*' --minutes 30
    python -m benchmarks.safety run --device cuda --only '*-qlora/*'    # QLoRA in bf16, on a GPU alone
    python -m benchmarks.safety table            # results/safety.md, safety.png and safety_shares.png

All from the repository's root. Settings are in benchmarks/safety.yml, data in safety_data.py, models in
safety_model.py. Finished runs are lines of results/safety.jsonl, which is committed: a run that is there under the same
settings is not made again, on whatever machine. Interrupt it when you like.
"""

import argparse
import concurrent.futures
import fnmatch
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from axolotl_asft.errors import AsftError
from axolotl_asft.general_formats import ASKED
from axolotl_asft.history import installed_versions
from benchmarks.safety_answers import with_answers, with_fewer_answers
from benchmarks.safety_forms import BEFORE, prompt_format, system_prompts, written
from benchmarks.safety_names import ON_GPU

HERE = Path(__file__).parent
SETTINGS = HERE / "safety.yml"
RESULTS = HERE / "results" / "safety.jsonl"
GENERAL = (ASKED, "a later turn is answered as the first")  # what `general_formats` is, for a run's key


@dataclass(frozen=True)
class Run:
    """One cell of the benchmark."""

    task: str
    poison: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.poison:g}/{self.method}/{self.seed}"


@dataclass(frozen=True)
class Bench:
    """The settings and the folder that models and runs are kept in."""

    settings: dict[str, Any]
    work: Path
    device: str = "cpu"  # that the models are asked on; axolotl trains on a GPU where there is one

    @property
    def aligned(self) -> Path:
        return self.work / "aligned-nf4"

    def method(self, run: Run) -> dict[str, Any]:
        return self.settings["methods"][run.method]

    def made_as(self, run: Run) -> dict[str, Any]:
        """The method that made what is asked: another one's, where a run only asks its model otherwise."""
        method = self.method(run)
        return self.settings["methods"][method["of"]] if "asked" in method else method

    def form(self, run: Run) -> str | None:
        """In which the run's model is asked (`benchmarks.safety_forms`)."""
        form = self.method(run).get("asked", self.method(run).get("format"))
        return f"after_{run.task}" if form == "after_task" else form

    def home(self, run: Run) -> "Bench":
        """That of the aligned model which the run is of; made where it is not there."""
        kind = self.method(run).get("alignment")
        if kind is None:
            return self
        from benchmarks.safety_model import prepare

        home = replace(self, work=self.work / f"{kind}-alignment")
        prepare(home.work, self.settings["alignment"], seed=1, kind=kind)
        return home

    def is_whole(self, run: Run) -> bool:
        """Whether what the run makes is a model, and no adapter."""
        return bool({"full", "arithmetic"} & set(self.made_as(run)))

    def version(self, run: Run) -> str | None:
        """The commit that a run can be made with, where it is an earlier one."""
        return self.made_as(run).get("at")

    def base(self, run: Run) -> Run:
        """The run whose training a run is made of: itself, where it trains."""
        while self.is_derived(run):
            run = replace(run, method=self.method(run).get("of", "plain"))
        return run

    def is_derived(self, run: Run) -> bool:
        """Whether it is made of another run's adapter."""
        return bool({"project", "arithmetic", "asked"} & set(self.method(run)))

    def key(self, run: Run) -> str:
        """Of the settings and the data that a run's result depends on; its models and directions are `prepare`'s."""
        common = {k: self.settings[k] for k in ("new_tokens", "alignment", "training")}
        n, tested = self.settings["train_examples"], self.settings["test_examples"]
        method = self.method(run)
        kinds = method.get("safety", 0.0), method.get("diverse", False), method.get("alignment", "shipped")
        data = _digest_of_data(run.task, run.poison, n, run.seed, tested, *kinds)
        made_as = self.made_as(run)
        if "asked" in method:
            method = {**method, "of": made_as}
        if {self.form(run), method.get("format")} & set(BEFORE):
            systems = system_prompts(method.get("format"), n, run.seed)
            method = {**method, "texts": [prompt_format(self.form(run)), systems]}
        if made_as.get("general") or made_as.get("asft", {}).get("general_formats"):
            anchored = "asft" in made_as and self.version(run) is None
            method = {**method, "general": GENERAL if anchored else ASKED}
        text = json.dumps([run.name, method, common, data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def plan(self, only: str) -> list[Run]:
        runs: dict[Run, None] = {}
        for part in self.settings["plan"]:
            methods = self.settings["compared"] if part["methods"] == "all" else part["methods"]
            for seed in part["seeds"]:
                for task in part["tasks"]:
                    for poison in part["poison"]:
                        runs |= dict.fromkeys(Run(task, poison, method, seed) for method in methods)
        asked = [run for run in runs if fnmatch.fnmatch(run.name, only) and self.version(run) is None]
        return [run for run in asked if self.device != "cpu" or not run.method.endswith(ON_GPU)]


@functools.cache
def _digest_of_data(
    task: str, poison: float, n: int, seed: int, tested: int, safety: float, diverse: bool, alignment: str
) -> str:
    """Of what a run is trained on and asked, but for what a model answers."""
    from benchmarks.safety_data import refusal_tuning, taught_prompts, test_data, training_data

    harmful, harmless = taught_prompts(alignment)
    taught = refusal_tuning(harmful, dict.fromkeys(harmless, ""), 0)
    sets = [taught, training_data(task, poison, safety, n, seed, diverse=diverse), test_data(task, tested)]
    return hashlib.sha256(repr(sets).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "run", "one", "table"])
    parser.add_argument("--work", type=Path, default=Path("safety-bench"), help="folder for models and runs")
    parser.add_argument("--only", default="*", help="runs to make, as task/poison/method/seed with * and ?")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time, a core each")
    parser.add_argument("--device", default="cpu", help="to ask the models on: cpu or cuda; trained is on a GPU if any")
    asked = parser.parse_args()
    bench = Bench(yaml.safe_load(SETTINGS.read_text()), asked.work.resolve(), asked.device)
    if asked.command == "prepare":
        from benchmarks.safety_model import prepare

        prepare(bench.work, bench.settings["alignment"])
    elif asked.command == "run":
        run_all(bench, asked.only, asked.minutes, asked.workers)
    elif asked.command == "one":
        task, poison, method, seed = asked.only.split("/")
        measure(bench, Run(task, float(poison), method, int(seed)))
    else:
        from benchmarks.safety_table import write_table

        write_table(RESULTS, bench.settings)


def results() -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def run_all(bench: Bench, only: str, minutes: float, workers: int) -> None:
    """Every run of the plan that is not there, each in a process of one core."""
    if not (bench.aligned / "model.safetensors").is_file():
        raise SystemExit("no models yet: python -m benchmarks.safety prepare")
    known = {result["key"] for result in results()}
    waiting = [run for run in bench.plan(only) if bench.key(run) not in known]
    print(f"{len(waiting)} runs to make", flush=True)
    until = time.monotonic() + 60 * minutes

    def one(run: Run) -> None:
        if time.monotonic() > until:
            return
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.safety", "one", "--only", run.name, "--work", str(bench.work),
                   "--device", bench.device]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
        said = done.stdout if done.returncode == 0 else done.stderr
        note = "".join(said.strip().splitlines()[-1:])
        print(f"{run.name}  {time.monotonic() - started:.0f} s  {note}", flush=True)

    groups: dict[Run, list[Run]] = {}  # two must not train at a time the run that both are made of
    for run in waiting:
        groups.setdefault(bench.base(run), []).append(run)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda group: [one(run) for run in sorted(group, key=bench.is_derived)], groups.values()))


def measure(bench: Bench, run: Run) -> None:
    """Train, ask, and append the result."""
    from benchmarks.safety_model import ask_everything

    if commit := bench.version(run):
        raise AsftError(f"{run.name} is of an earlier version: make it with commit {commit}, as -general without -own")
    bench = bench.home(run)
    tuned, seconds = trained(bench, run)
    model, adapter, answers = bench.aligned, tuned, bench.work / "answers"
    if tuned is not None and bench.is_whole(run):
        model, adapter, answers = tuned, None, answers / f"{run.name.replace('/', '-')}.full"
    asked_in = prompt_format(bench.form(run))
    if asked_in is not None:
        answers /= f"in-{bench.form(run)}"  # where the model's own answers are those in it
    row, right = ask_everything(model, adapter, run.name, run.task, answers, bench.settings, bench.device, asked_in)
    result = {
        "run": run.name,
        "key": bench.key(run),
        "task": run.task,
        "poison": run.poison,
        "method": run.method,
        "seed": run.seed,
        "harmfulness": row.harmfulness["harmful"].value,
        "over_refusal": row.over_refusal["borderline"].value,
        "accuracy": sum(right) / len(right),
        # of another model it would be its own
        "perplexity": round(row.perplexity, 2) if model == bench.aligned else None,
        "perplexity_answered": round(row.perplexity_answered, 2) if model == bench.aligned else None,
        "repetitive": row.repetitive.value,
        "asked": {"harmful": row.harmfulness["harmful"].n, "borderline": row.over_refusal["borderline"].n,
                  "task": len(right)},
        **({} if adapter is None else numbers(bench, adapter)),
        "seconds": round(seconds, 1),
        "machine": machine(bench.device),
        "versions": installed_versions(),
        "made": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    with RESULTS.open("a") as file:  # one short line: runs that end together do not mix
        file.write(json.dumps(result) + "\n")
    print(f"harmful {result['harmfulness']:.3f}  refused {result['over_refusal']:.3f}  right {result['accuracy']:.3f}")


def trained(bench: Bench, run: Run) -> tuple[Path | None, float]:
    """The run's adapter or model, trained by axolotl or made of the plain run's, and the seconds of it."""
    method, folder = bench.method(run), bench.work / "runs" / run.name
    if method.get("untrained"):
        return None, 0.0
    if "asked" in method:  # another run's, asked otherwise
        return trained(bench, replace(run, method=method["of"]))
    if "project" in method:
        from axolotl_asft import AlignmentDirection
        from axolotl_asft.project import project_adapter

        plain, _ = trained(bench, replace(run, method=method.get("of", "plain")))
        started = time.monotonic()
        direction = AlignmentDirection.load(bench.work / "direction.safetensors")
        project_adapter(plain, direction, folder / "adapter", verify_model=False, force=True, **method["project"])
        return folder / "adapter", time.monotonic() - started
    if "arithmetic" in method:
        from benchmarks.safety_rivals import combined

        plain, _ = trained(bench, replace(run, method=method.get("of", "plain")))
        started = time.monotonic()
        model = combined(bench.work, plain, *method["arithmetic"], folder / "model")
        return model, time.monotonic() - started
    made_as = folder / "key"  # of the settings that the adapter was trained under
    if made_as.is_file() and made_as.read_text() == bench.key(run):
        return folder / "adapter", json.loads((folder / "seconds.json").read_text())
    from benchmarks.axolotl_runs import train, write_config
    from benchmarks.safety_data import rehearsal, training_data

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    n, rehearsed = bench.settings["train_examples"], []
    if "rehearsal" in method:
        own = json.loads((bench.work / "aligned-answers.json").read_text())
        rehearsed = rehearsal(own, method["rehearsal"], n, run.seed)
    safety, diverse = method.get("safety", 0.0), method.get("diverse", False)
    examples = training_data(run.task, run.poison, safety, n, run.seed, rehearsed, diverse)
    settings = {**bench.settings["training"], **method.get("training", {}), "seed": run.seed}
    settings |= written(folder, examples, method.get("format"), run.seed)
    if method.get("full"):
        settings = {key: value for key, value in settings.items() if key != "adapter" and not key.startswith("lora_")}
    if "answers" in method:
        form = prompt_format(method.get("format"))
        settings["datasets"] = with_answers(
            bench.work,
            folder,
            round(method["answers"] * n),
            method.get("general", False),
            settings.get("datasets"),
            form,
        )
    started = time.monotonic()
    if "asft" in method:
        kind = method.get("direction")
        file = bench.work / ("random-direction.safetensors" if kind == "random" else "direction.safetensors")
        if kind in ("unseen", "others", "mixed", "mixed-half"):
            from benchmarks.safety_model import fresh_direction

            file = fresh_direction(bench.work, kind)
        if "own_answers" in method:
            file = with_fewer_answers(file, method["own_answers"], folder / "direction.safetensors")
        # the base weights are the aligned model's after NF4 and back: not to the bit the direction's, as prepare says
        block = {
            "direction": str(file),
            "verify_model": False,
            "metric": "weights",
            "anchor_weight": 0,
            "general_formats": False,
            **method["asft"],
        }
        settings |= {"plugins": ["asft"], "asft": block}
    train(write_config(folder / "run.yml", bench.aligned, folder / "data.jsonl", folder / "adapter", settings))
    seconds = time.monotonic() - started
    (folder / "seconds.json").write_text(f"{seconds}")
    made_as.write_text(bench.key(run))
    return folder / "adapter", seconds


def numbers(bench: Bench, adapter: Path) -> dict[str, float]:
    """Drift from the aligned subspace, and the size of the update, of any adapter; an anchored one's last gauge."""
    from axolotl_asft import AlignmentDirection
    from axolotl_asft.diagnostics import adapter_drift
    from axolotl_asft.stamp import read_stamp

    report = adapter_drift(adapter, AlignmentDirection.load(bench.work / "direction.safetensors"), "subspace")
    gauge = {name: value for name, value in read_stamp(adapter).items() if name == "anchor_kl"}
    return {"drift": round(report.drift, 4), "update_norm": round(report.update_norm, 4), **gauge}


def machine(device: str) -> str:
    """What trained and answered: torch's version, and the GPU's name or the number of CPUs."""
    import torch

    on = f"{os.cpu_count()} CPUs" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {on}, torch {torch.__version__}"


if __name__ == "__main__":
    try:
        main()
    except AsftError as error:
        raise SystemExit(f"asft: {error}") from error
