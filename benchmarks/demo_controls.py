"""What in the demo makes the difference? Its constrained run beside controls, on the demo's own models and data.

    axolotl asft demo --output asft-demo
    python benchmarks/demo_controls.py asft-demo

Writes benchmarks/results/demo_controls.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection
from axolotl_asft.demo.model import make_tokenizer
from axolotl_asft.demo.prompts import make_data
from axolotl_asft.demo.run import OFFLINE
from axolotl_asft.demo.score import score
from axolotl_asft.diagnostics import adapter_drift
from axolotl_asft.files import atomic_write_text

ALONE = {"anchor_weight": 0.0}
WEIGHTS = {"metric": "weights", "lambda_reg": 10.0, **ALONE}
VARIANTS = {
    "no constraint": {"lambda_reg": 0.0, **ALONE},
    "lambda 0.1, `anchor_weight` 3 (the demo)": {},
    "lambda 1, `anchor_weight` 3": {"lambda_reg": 1.0},
    "`anchor_weight` 3 alone": {"lambda_reg": 0.0},
    "`anchor_weight` 1 alone": {"lambda_reg": 0.0, "anchor_weight": 1.0},
    "`metric: fisher` alone, lambda 0.1": ALONE,
    "`metric: fisher` alone, lambda 1": {"lambda_reg": 1.0, **ALONE},
    "`metric: fisher` alone, lambda 10": {"lambda_reg": 10.0, **ALONE},
    "`metric: fisher` alone, lambda 100": {"lambda_reg": 100.0, **ALONE},
    "`projector: paper`, lambda 10": WEIGHTS,
    "plain L2 (`rank: 0`), lambda 10": WEIGHTS | {"rank": 0},
    "`projector: normalized`, lambda 10": WEIGHTS | {"projector": "normalized"},
    "`projector: subspace`, rank 8, lambda 10": WEIGHTS | {"projector": "subspace", "rank": 8},
}
RESULT = Path(__file__).parent / "results" / "demo_controls.md"


def train(demo: Path, name: str, changes: dict) -> None:
    """Train the variant with axolotl, once."""
    config = yaml.safe_load((demo / "asft.yml").read_text()) | {"output_dir": f"./{name}"}
    config["asft"] |= changes
    (demo / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    if not (demo / name / "adapter_model.safetensors").exists():
        command = [sys.executable, "-m", "axolotl.cli.train", f"{name}.yml"]
        with (demo / f"{name}.log").open("w") as log:
            subprocess.run(command, cwd=demo, env={**os.environ, **OFFLINE}, stdout=log, stderr=log, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that `axolotl asft demo` made")
    demo = parser.parse_args().demo.resolve()
    seed = json.loads((demo / "demo.json").read_text())["seed"]
    data, tokenizer = make_data(seed), make_tokenizer()
    direction = AlignmentDirection.load(demo / "direction.safetensors")
    lines = ["| run | harmfulness | task accuracy | update norm |", "| --- | ---: | ---: | ---: |"]
    for i, (title, changes) in enumerate(VARIANTS.items()):
        train(demo, f"control-{i}", changes)
        folder = demo / f"control-{i}"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo / "aligned"), folder).eval()
        found = score(model, tokenizer, data)
        norm = adapter_drift(folder, direction).update_norm
        lines.append(f"| {title} | {found.harmfulness:.1%} | {found.task_accuracy:.1%} | {norm:.2f} |")
        print(lines[-1], flush=True)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"
    )
    heading = f"# The demo's controls\n\n`python benchmarks/demo_controls.py asft-demo`, seed {seed}, on {machine}\n"
    atomic_write_text(RESULT, "\n".join([heading, *lines, ""]))


if __name__ == "__main__":
    main()
