"""The tests that need a GPU, run on one: which passed, how long each took, and on what.

    python -m benchmarks.gpu_tests                                   # runs them, some three minutes
    python -m benchmarks.gpu_tests first.log second.log --machine 'NVIDIA H100, torch 2.11.0'

From the repository's root. With logs of `ASFT_TEST_GPU=1 pytest -v -m gpu --durations=0 -n N` it reads them instead; of
a test in several the last outcome stands. Writes benchmarks/results/gpu_tests.md.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from axolotl_asft.files import atomic_write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu_tests.md"
COMMAND = ["-m", "pytest", "-v", "-m", "gpu", "--durations=0", "-n", "4", "-p", "no:warnings"]
OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+?::.+?) *$", re.M)
SECONDS = re.compile(r"^([\d.]+)s call +(tests/\S+?::.+?) *$", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="*")
    parser.add_argument("--machine", help="of the logs")
    parser.add_argument("--note", default="", help="what a reader of the outcomes has to know")
    asked = parser.parse_args()
    if asked.logs and not asked.machine:
        parser.error("logs do not say what they were made on: --machine")
    texts = [path.read_text() for path in asked.logs] or [run()]
    machine = asked.machine or this_machine()
    atomic_write_text(RESULT, report(texts, machine, asked.note))
    print(f"wrote {RESULT}")


def run() -> str:
    environment = {**os.environ, "ASFT_TEST_GPU": "1"}
    done = subprocess.run([sys.executable, *COMMAND], cwd=ROOT, env=environment, capture_output=True, text=True)
    if not OUTCOME.search(done.stdout):
        raise SystemExit(f"no test ran:\n{done.stdout}{done.stderr}")
    return done.stdout


def this_machine() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


def report(logs: list[str], machine: str, note: str = "") -> str:
    outcomes: dict[str, str] = {}
    seconds: dict[str, str] = {}
    for log in logs:
        found = {test: outcome for outcome, test in OUTCOME.findall(log)}
        outcomes |= found
        seconds = {test: took for test, took in seconds.items() if test not in found}
        seconds |= {test: took for took, test in SECONDS.findall(log)}
    rows = [f"| `{test}` | {outcomes[test].lower()} | {seconds.get(test, '')} |" for test in sorted(outcomes)]
    head = [
        "# The tests that need a GPU",
        "",
        f"`python -m benchmarks.gpu_tests` on {machine}, {time.strftime('%F')}.",
        "",
    ]
    return "\n".join(
        [*head, "| test | outcome | seconds |", "| --- | --- | ---: |", *rows, *(["", note] * bool(note)), ""]
    )


if __name__ == "__main__":
    main()
