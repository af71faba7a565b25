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

VARIANTS = {
    "no constraint": {"lambda_reg": 0.0},
    "AsFT `paper`, lambda 5": {"lambda_reg": 5.0},
    "AsFT `paper`, lambda 10 (the demo)": {},
    "AsFT `paper`, lambda 20": {"lambda_reg": 20.0},
    "plain L2 (`rank: 0`), lambda 10": {"rank": 0},
    "AsFT `normalized`, lambda 10": {"projector": "normalized"},
    "AsFT `subspace`, rank 8, lambda 10": {"projector": "subspace", "rank": 8},
}
RESULT = Path(__file__).parent / "results" / "demo_controls.md"


def train(demo: Path, name: str, changes: dict) -> dict:
    """Train the variant with axolotl, once; returns its asft block."""
    config = yaml.safe_load((demo / "asft.yml").read_text()) | {"output_dir": f"./{name}"}
    config["asft"] |= changes
    (demo / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    if not (demo / name / "adapter_model.safetensors").exists():
        command = [sys.executable, "-m", "axolotl.cli.train", f"{name}.yml"]
        with (demo / f"{name}.log").open("w") as log:
            subprocess.run(command, cwd=demo, env={**os.environ, **OFFLINE}, stdout=log, stderr=log, check=True)
    return config["asft"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder that `axolotl asft demo` made")
    demo = parser.parse_args().demo.resolve()
    seed = json.loads((demo / "demo.json").read_text())["seed"]
    data, tokenizer = make_data(seed), make_tokenizer()
    direction = AlignmentDirection.load(demo / "direction.safetensors")
    lines = ["| run | harmfulness | task accuracy | drift | update norm |", "| --- | ---: | ---: | ---: | ---: |"]
    for i, (title, changes) in enumerate(VARIANTS.items()):
        block = train(demo, f"control-{i}", changes)
        folder = demo / f"control-{i}"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo / "aligned"), folder).eval()
        found = score(model, tokenizer, data)
        report = adapter_drift(folder, direction, block["projector"], block.get("rank"))
        lines.append(
            f"| {title} | {found.harmfulness:.1%} | {found.task_accuracy:.1%} | {report.drift:.2f} | "
            f"{report.update_norm:.2f} |"
        )
        print(lines[-1], flush=True)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"
    )
    heading = f"# The demo's controls\n\n`python benchmarks/demo_controls.py asft-demo`, seed {seed}, on {machine}\n"
    atomic_write_text(RESULT, "\n".join([heading, *lines, ""]))


if __name__ == "__main__":
    main()
