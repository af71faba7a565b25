"""What the constraint costs: of a training step, of memory, of a start; beside the authors' formula; and how it grows.

    python -m benchmarks.step_overhead                     # everything on this machine's CPU: about half an hour
    python -m benchmarks.step_overhead step --model 7B     # a random Llama in NF4 on a GPU, 2048 tokens
    python -m benchmarks.step_overhead step --model 7B --variants 'r = 16, accumulation 1, fisher*'
    python -m benchmarks.step_overhead penalty groups growth memory startup table

From the repository's root. Measured side by side, in turns, in one process; each part replaces its lines in
results/step_overhead.json, and `table` draws results/step_overhead.md and .png from it.
"""

import argparse
import fnmatch
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from axolotl_asft import AlignmentDirection
from axolotl_asft.files import atomic_write_text
from axolotl_asft.layer_groups import may_take
from benchmarks.measuring import machine
from benchmarks.penalty_cost import groups, growth, memory, penalty_alone, startup
from benchmarks.shapes import SHAPES, lora_model, random_direction

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "step_overhead.json"
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "step": step,
        "penalty": penalty_alone,
        "groups": groups,
        "growth": growth,
        "memory": memory,
        "startup": startup,
    }
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}, table; default: all")
    parser.add_argument("--model", default="SmolLM2-135M", choices=SHAPES, help="of the part `step`")
    parser.add_argument("--variants", default="*", help="of the part `step`, by their names with * and ?")
    parser.add_argument("--base", type=Path, help="SmolLM2 as benchmarks.safety_model makes it, or its tokenizer alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - {*parts, "table"}:
        parser.error(f"{', '.join(sorted(unknown))}; expected {', '.join(parts)} or table")
    for name in asked.parts or [*parts, "table"]:
        if name == "table":
            from benchmarks.step_overhead_table import write_table

            write_table(RESULTS)
            continue
        print(f"{name} ...", flush=True)
        for line in parts[name](asked):
            keep(name, asked.device, line)


def keep(part: str, device: str, line: dict[str, Any]) -> None:
    """Put the line in the place of what was measured before on this kind of device."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    what = (part, device, line.get("what"))
    found = [other for other in found if (other["part"], other["device"], other.get("what")) != what]
    where = {"part": part, "device": device, "machine": machine(device), "made": time.strftime("%Y-%m-%d")}
    where |= {} if part == "groups" else {"groups of": may_take()}
    lines = [json.dumps(each) for each in (*found, where | line)]
    atomic_write_text(RESULTS, "".join(["[\n", ",\n".join(lines), "\n]\n"]))
    print(json.dumps(line), flush=True)


# ---- a training step, through axolotl


@dataclass(frozen=True)
class Variant:
    """A kind of constraint, and what its cost depends on."""

    r: int = 16
    accumulation: int = 1
    sketch: int = 0  # columns of a Fisher metric; 0: the metric of the weights, k = 64
    anchored: bool = False  # with answers to ask for: what a block with nothing but a direction has by default

    def __str__(self) -> str:
        metric = f"fisher, {self.sketch} columns" if self.sketch else "weights, k = 64"
        return f"r = {self.r}, accumulation {self.accumulation}, {metric}{', and the anchor' * self.anchored}"


ON_A_CPU = [Variant(), Variant(sketch=256), Variant(sketch=256, anchored=True)]
ON_A_GPU = [
    *(replace(variant, r=r) for r in (16, 64) for variant in ON_A_CPU),
    Variant(accumulation=4),
    Variant(accumulation=4, sketch=256, anchored=True),
]


def step(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One optimizer step with and without the constraint, in turns in one axolotl run; every kind of penalty."""
    on_gpu = asked.device == "cuda"
    known = ON_A_GPU if on_gpu else ON_A_CPU
    variants = [variant for variant in known if fnmatch.fnmatchcase(str(variant), asked.variants)]
    if not variants:
        raise SystemExit(f"no variant is like {asked.variants!r}; there are {'; '.join(map(str, known))}")
    with tempfile.TemporaryDirectory(prefix="asft-step-") as folder:
        model = _checkpoint(asked, Path(folder))
        for variant in variants:
            record = _train(Path(folder), model, asked.model, variant, on_gpu)[2:]  # the first two warm up
            on, off = ([line for line in record if line["constrained"] == which] for which in (True, False))
            without = statistics.median(line["seconds"] for line in off)
            added, penalty, anchor = (
                statistics.median(line[key] for line in on) for key in ("added", "penalty", "anchor")
            )
            peaks = {}
            if on_gpu:
                most, least = (max(line["peak"] for line in kind) for kind in (on, off))
                kept = record[0]["kept"]
                peaks = {"peak without": least - kept, "kept": kept, "extra peak": most - least}
            yield {
                "what": f"{asked.model}, {variant}",
                "step": without, "constrained step": statistics.median(line["seconds"] for line in on),
                "added": added, "penalty": penalty, "anchor": anchor, "share": added / without,
                "steps": len(record),
                **peaks,
            }  # fmt: skip


def _checkpoint(asked: argparse.Namespace, folder: Path) -> Path:
    """SmolLM2 itself, or random weights of a shape with its tokenizer."""
    from benchmarks.safety_model import make_base

    name, smollm2 = asked.model, asked.base or make_base(folder / "SmolLM2-135M")
    if name == "SmolLM2-135M":
        return smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.device(asked.device):
        config = SHAPES[name].config(vocabulary=49152)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        torch.cuda.empty_cache()  # the training is another process's
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder / name)
    return folder / name


def _train(folder: Path, model: Path, name: str, variant: Variant, on_gpu: bool) -> list[dict[str, Any]]:
    from benchmarks.axolotl_runs import train, write_chats, write_config
    from benchmarks.safety_data import Example

    r, accumulation = variant.r, variant.accumulation
    direction = folder / f"{name}-{variant.sketch}-{variant.anchored}.safetensors"
    if not direction.is_file():
        _write_direction(name, variant, direction, "cuda" if on_gpu else "cpu")
    length, micro, steps = (2048, 1, 12) if on_gpu else (512, 4, 8)
    long = "Say it again, as you did before, and then once more. " * (length // 10)
    write_chats(folder / "long.jsonl", [Example(f"{i}: {long}", long) for i in range(micro * accumulation * steps)])
    kind = {"adapter": "qlora", "load_in_4bit": True, "bf16": True, "gradient_checkpointing": True} if on_gpu else {
        "adapter": "lora"
    }  # fmt: skip
    settings = {
        "plugins": ["asft", "benchmarks.alternating_plugin.AlternatingPlugin"],
        "asft": {"direction": str(direction), "verify_model": False},
        "lora_r": r,
        "lora_alpha": 2 * r,
        "lora_target_linear": True,
        **({} if on_gpu else dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)),
        "excess_length_strategy": "truncate",
        "sequence_len": length,
        "pad_to_sequence_len": True,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 1e-4,
        **kind,
    }
    config = write_config(folder / "run.yml", model, folder / "long.jsonl", folder / "out", settings)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    train(config)
    return json.loads((folder / "out" / "steps.json").read_text())


def _write_direction(name: str, variant: Variant, path: Path, device: str) -> None:
    """Random directions of the model's shapes, and answers as many and as long as `extract` keeps."""
    from axolotl_asft.evaluation.prompts import load_prompts
    from axolotl_asft.metrics import OWN_WORDS

    empty = lora_model(SHAPES[name].config(), 1)
    direction = random_direction(empty, 0 if variant.sketch else 64, variant.sketch, orthonormal=True, device=device)
    if variant.anchored:
        chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        prompts = [*load_prompts("harmful", "train"), *load_prompts("borderline", "train")]
        answers = [(chat.format(prompt.prompt), " no" * OWN_WORDS) for prompt in prompts]
        direction = AlignmentDirection(direction.modules, {**direction.spec, "own_answers": answers})
    direction.save(path)


if __name__ == "__main__":
    main()
