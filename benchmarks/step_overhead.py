"""What the constraint costs: of a training step, of memory, of a start; beside the authors' formula; and how it grows.

    python -m benchmarks.step_overhead                     # everything on this machine's CPU: about half an hour
    python -m benchmarks.step_overhead step --model 7B     # a random Llama in NF4 on a GPU, 2048 tokens
    python -m benchmarks.step_overhead penalty growth memory startup table

From the repository's root. Measured side by side, in turns, in one process; each part replaces its lines in
results/step_overhead.json, and `table` draws results/step_overhead.md and .png from it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axolotl_asft import AlignmentDirection, AlignmentPenalty
from axolotl_asft.files import atomic_write_text
from axolotl_asft.penalty import lora_penalty, orthogonal_part, projector_eigenvalues
from benchmarks.counting import Counter
from benchmarks.shapes import SHAPES, Shape, lora_model, random_direction, random_penalty, stored_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "step_overhead.json"
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"step": step, "penalty": penalty_alone, "growth": growth, "memory": memory, "startup": startup}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}, table; default: all")
    parser.add_argument("--model", default="SmolLM2-135M", choices=SHAPES, help="of the part `step`")
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
        keep(name, asked.device, parts[name](asked))


def keep(part: str, device: str, lines: list[dict[str, Any]]) -> None:
    """Put the lines in the place of what was measured before on this kind of device."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    where = {"part": part, "device": device, "machine": machine(device), "made": time.strftime("%Y-%m-%d")}
    lines = [where | line for line in lines]
    replaced = {(line["part"], line["device"], line.get("what")) for line in lines}
    found = [line for line in found if (line["part"], line["device"], line.get("what")) not in replaced]
    atomic_write_text(RESULTS, "".join(["[\n", ",\n".join(json.dumps(line) for line in found + lines), "\n]\n"]))
    for line in lines:
        print(json.dumps({key: value for key, value in line.items() if key not in where}), flush=True)


def machine(device: str) -> str:
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {chip}, torch {torch.__version__}"


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """The median seconds of each, run one after the other `repeats` times after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            _wait(device)
            started = time.perf_counter()
            function()
            _wait(device)
            if turn or repeats == 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- a training step, through axolotl


def step(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One optimizer step with and without the constraint, in turns in one axolotl run; every kind of penalty."""
    on_gpu = asked.device == "cuda"
    lines = []
    with tempfile.TemporaryDirectory(prefix="asft-step-") as folder:
        model = _checkpoint(asked.model, Path(folder))
        variants = [(r, 1, sketch) for r in (16, 64) for sketch in (0, 256)] + [(16, 4, 0)] * on_gpu
        for r, accumulation, sketch in variants if on_gpu else [(16, 1, 0), (16, 1, 256)]:
            record = _train(Path(folder), model, asked.model, r, accumulation, sketch, on_gpu)[
                2:
            ]  # the first two warm up
            on, off = ([line for line in record if line["constrained"] == which] for which in (True, False))
            penalty, without = (
                statistics.median(line[key] for line in kind) for kind, key in ((on, "penalty"), (off, "seconds"))
            )
            metric = f"fisher, {sketch} columns" if sketch else "weights, k = 64"
            lines.append({
                "what": f"{asked.model}, r = {r}, accumulation {accumulation}, {metric}",
                "step": without, "constrained step": statistics.median(line["seconds"] for line in on),
                "penalty": penalty, "share": penalty / without,
                "log line": max(line["log line"] for line in record), "steps": len(record),
                "extra peak": max(line["peak"] for line in on) - max(line["peak"] for line in off) if on_gpu else None,
            })  # fmt: skip
    return lines


def _checkpoint(name: str, folder: Path) -> Path:
    """SmolLM2 itself, or random weights of a shape with its tokenizer."""
    from benchmarks.safety_model import make_base

    smollm2 = make_base(folder / "SmolLM2-135M")
    if name == "SmolLM2-135M":
        return smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = SHAPES[name].config(vocabulary=49152)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder / name)
    return folder / name


def _train(
    folder: Path, model: Path, name: str, r: int, accumulation: int, sketch: int, on_gpu: bool
) -> list[dict[str, Any]]:
    from benchmarks.axolotl_runs import train, write_chats, write_config
    from benchmarks.safety_data import Example

    direction = folder / f"{name}-{sketch}.safetensors"
    if not direction.is_file():
        empty = lora_model(SHAPES[name].config(), 1)
        random_direction(empty, 0 if sketch else 64, sketch, orthonormal=True).save(direction)
    length, micro, steps = (2048, 1, 12) if on_gpu else (512, 4, 8)
    long = "Say it again, as you did before, and then once more. " * (length // 10)
    write_chats(folder / "long.jsonl", [Example(f"{i}: {long}", long) for i in range(micro * accumulation * steps)])
    kind = {"adapter": "qlora", "load_in_4bit": True, "bf16": True, "gradient_checkpointing": True} if on_gpu else {
        "adapter": "lora"
    }  # fmt: skip
    settings = {
        "plugins": ["asft", "benchmarks.alternating_plugin.AlternatingPlugin"],
        "asft": {"direction": str(direction), "verify_model": False, "lambda_reg": 1.0},
        "lora_r": r,
        "lora_alpha": 2 * r,
        "lora_target_linear": True,
        **({} if on_gpu else {key: False for key in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")}),
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


# ---- the penalty alone


def penalty_alone(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Value and gradient: ours, the naive factored way, and the authors' literal formula, on one device."""
    lines = []
    for what, shape, layers in (
        ("one layer, 4096 x 4096", None, 1),
        ("SmolLM2-135M, 210 layers", SHAPES["SmolLM2-135M"], 30),
    ):
        if shape is None:
            model = lora_model(Shape(4096, 4096, 64, 1, 32).config(1), 16, device=asked.device)
            options: dict[str, Any] = {"modules": ["q_proj$"], "on_uncovered": "ignore"}
        else:
            model, options = lora_model(shape.config(layers), 16, device=asked.device), {}
        penalty = AlignmentPenalty(model, random_direction(model, 64), verify_model=False, **options)
        functions = {
            "ours": penalty.add_gradient,
            "one layer at a time": lambda penalty=penalty: layer_by_layer(penalty),
            "naive, factored": lambda penalty=penalty: naive(penalty),
        }
        seconds = in_turns(functions, 7, asked.device)
        projectors = literal_projectors(penalty)  # made once: the authors' code makes them at every start
        ours_again, literal = in_turns(
            {"ours": penalty.add_gradient, "literal": lambda p=penalty, C=projectors: authors(p, C)}, 1, asked.device
        ).values()
        with Counter() as counted:
            penalty.add_gradient()
        with Counter() as one_by_one:
            layer_by_layer(penalty)
        with Counter() as literally:
            authors(penalty, projectors, first=1)
        kept = sum(C.nbytes for C in projectors)
        lines.append({
            "what": what, **seconds, "ours beside literal": ours_again, "literal": literal, "ratio": literal / ours_again,
            "launches": counted.launches, "launches one by one": one_by_one.launches, "waits": len(counted.waits),
            "temporaries": counted.peak, "stored": stored_bytes(penalty),
            "literal temporaries": literally.peak, "literal stored": kept,
        })  # fmt: skip
    return lines


def layer_by_layer(penalty: AlignmentPenalty) -> None:
    """The same closed formula through autograd, a layer at a time."""
    total = 0
    for layer in penalty.layers:
        module = penalty.direction.modules[layer.name]
        c = projector_eigenvalues(penalty.projector, module.S, module.norm).to(layer.A.device)
        total = total + lora_penalty(layer.A, layer.B, module.U.to(layer.A.device), c, layer.scaling)
    total.backward()


def naive(penalty: AlignmentPenalty) -> None:
    """((I - C) B) A written out, out x in, and autograd."""
    total = 0
    for layer in penalty.layers:
        module = penalty.direction.modules[layer.name]
        c = projector_eigenvalues(penalty.projector, module.S, module.norm).to(layer.A.device)
        Z = orthogonal_part(layer.B.float(), module.U.float().to(layer.A.device), c)
        total = total + (layer.scaling * Z @ layer.A.float()).square().sum()
    total.backward()


def literal_projectors(penalty: AlignmentPenalty) -> list[torch.Tensor]:
    """C of every layer, out x out."""
    projectors = []
    for layer in penalty.layers:
        module = penalty.direction.modules[layer.name]
        U = module.U.float().to(layer.A.device)
        c = projector_eigenvalues(penalty.projector, module.S, module.norm).to(U.device)
        projectors.append((U * c) @ U.T)
    return projectors


def authors(penalty: AlignmentPenalty, projectors: list[torch.Tensor], first: int | None = None) -> None:
    """||dW - C dW||^2 with dW = B A, out x in, and C, out x out: AsFT's and Safe LoRA's formula as it is written."""
    total = 0
    for layer, C in list(zip(penalty.layers, projectors, strict=True))[:first]:
        update = layer.B @ layer.A
        total = total + torch.linalg.matrix_norm(update - C @ update) ** 2
    total.backward()


# ---- growth


def growth(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of one penalty over layers, width, r and k, one of them at a time."""
    middle = {"layers": 8, "width": 1024, "r": 16, "k": 64}
    ranges = {
        "layers": (1, 2, 4, 8, 16, 32),
        "width": (256, 512, 1024, 2048, 4096),
        "r": (4, 8, 16, 32, 64),
        "k": (1, 16, 32, 64, 128),
    }
    lines = []
    for over, values in ranges.items():
        for value in values:
            at = middle | {over: value}
            shape = Shape(at["width"], at["width"], 2 * at["width"], at["layers"], 8)
            penalty = random_penalty(shape, at["layers"], at["r"], at["k"], device=asked.device)
            seconds = in_turns({"ours": penalty.add_gradient}, 9, asked.device)["ours"]
            with Counter() as counted:
                penalty.add_gradient()
            lines.append({
                "what": f"{over} = {value}", "over": over, "at": value, "seconds": seconds, "model": operations(penalty),
                "temporaries": counted.peak, "stored": stored_bytes(penalty), "launches": counted.launches,
            })  # fmt: skip
    return lines


def operations(penalty: AlignmentPenalty) -> int:
    """Multiplications by the design's model: sum over layers of (out (k + r) + in r) r."""
    total = 0
    for group in penalty.groups:
        for found in group.found:
            out, wide = found.shape
            r, k = found.A.shape[0], group.U.shape[2]
            total += (out * (k + r) + wide * r) * r
    return total


# ---- memory and start


def memory(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What stays on the device and what is there for a moment, from a few decoder layers of each shape."""
    lines = []
    for name, layers in (("SmolLM2-135M", 30), ("1B", 16), ("7B", 4), ("8B", 4), ("70B", 2)):
        for sketch in (0, 256):
            penalty = random_penalty(SHAPES[name], layers, 16, 64, sketch, asked.device)
            with Counter() as counted:
                penalty.add_gradient()
            times = SHAPES[name].layers / layers
            lines.append({
                "what": f"{name}, {f'fisher, {sketch} columns' if sketch else 'weights, k = 64'}",
                "stored": round(stored_bytes(penalty) * times), "temporaries": counted.peak,
                "launches": round(counted.launches * times), "measured layers": layers, "layers": SHAPES[name].layers,
            })  # fmt: skip
    return lines


def startup(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Importing the package, the command's help, and a direction file of a 7B model."""
    lines = [_imports(), _help()]
    with tempfile.TemporaryDirectory(prefix="asft-start-") as folder:
        file = Path(folder) / "direction.safetensors"
        model = lora_model(SHAPES["7B"].config(), 16, device="cpu")
        random_direction(model, 64, 20, orthonormal=True).save(file)
        started = time.perf_counter()
        direction = AlignmentDirection.load(file)
        loaded = time.perf_counter()
        AlignmentPenalty(model, direction, metric="weights", verify_model=False)
        built = time.perf_counter()
    size = sum(
        module.U.nbytes + sum(m.inputs.nbytes + m.outputs.nbytes for m in module.metrics.values())
        for module in direction.modules.values()
    )
    lines.append({"what": "7B direction file", "bytes": size, "load": loaded - started, "build": built - loaded})
    return lines


def _imports() -> dict[str, Any]:
    code = (
        "import sys, time; started = time.perf_counter(); import axolotl_asft; "
        "print((time.perf_counter() - started) * 1e3, 'torch' in sys.modules)"
    )
    found = [
        _python("-S", "-c", f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); {code}").split() for _ in range(9)
    ]
    assert all(torch_too == "False" for _, torch_too in found)
    return {"what": "import axolotl_asft", "milliseconds": statistics.median(float(ms) for ms, _ in found[1:])}


def _help() -> dict[str, Any]:
    ours, theirs = [["-m", "axolotl.cli.main", *words, "--help"] for words in (["asft"], [])]
    seconds = in_turns({"ours": lambda: _python(*ours), "axolotl's": lambda: _python(*theirs)}, 5)
    return {"what": "axolotl asft --help", **seconds}


def _python(*arguments: str) -> str:
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout


if __name__ == "__main__":
    main()
