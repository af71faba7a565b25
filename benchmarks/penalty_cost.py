"""The parts of the cost benchmark that need no training: the penalty alone, its growth, memory, and the start."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from axolotl_asft import AlignmentDirection, AlignmentPenalty, layer_groups
from axolotl_asft.lora import FoundLayer
from axolotl_asft.penalty import lora_penalty, orthogonal_part
from benchmarks.counting import Counter
from benchmarks.measuring import in_turns
from benchmarks.shapes import SHAPES, Shape, lora_model, random_direction, random_penalty, stored_bytes

ROOT = Path(__file__).parent.parent


def penalty_alone(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Value and gradient: ours, the naive factored way, and the authors' literal formula, on one device."""
    lines = []
    one = {"modules": ["q_proj$"], "on_uncovered": "ignore"}
    for what, shape, options, repeats in (
        ("one layer, 4096 x 4096", Shape(4096, 4096, 64, 1, 32), one, 3),
        ("SmolLM2-135M, 210 layers", SHAPES["SmolLM2-135M"], {}, 5),
    ):
        model = lora_model(shape.config(), 16, device=asked.device)
        penalty = AlignmentPenalty(
            model, random_direction(model, 64, device=asked.device), verify_model=False, **options
        )
        factors = [projector_of(penalty, layer) for layer in penalty.layers]
        projectors = literal_projectors(factors)  # made once: the authors' code makes them at every start
        functions = {
            "ours": penalty.add_gradient,
            "one layer at a time": partial(layer_by_layer, penalty, factors),
            "naive, factored": partial(naive, penalty, factors),
            "literal": partial(authors, penalty, projectors),
        }
        seconds = in_turns(functions, repeats, asked.device)
        with Counter() as counted:
            penalty.add_gradient()
        with Counter() as one_by_one:
            layer_by_layer(penalty, factors)
        with Counter() as literally:
            authors(penalty, projectors)
        kept = sum(C.nbytes for C in projectors)
        lines.append({
            "what": what, **seconds, "ratio": seconds["literal"] / seconds["ours"],
            "launches": counted.launches, "launches one by one": one_by_one.launches, "waits": len(counted.waits),
            "temporaries": counted.peak, "stored": stored_bytes(penalty),
            "literal temporaries": literally.peak, "literal stored": kept,
        })  # fmt: skip
    return lines


Factors = list[tuple[torch.Tensor, torch.Tensor]]  # U and c of every layer


def layer_by_layer(penalty: AlignmentPenalty, factors: Factors) -> None:
    """The same closed formula through autograd, a layer at a time."""
    total = 0
    for layer, (U, c) in zip(penalty.layers, factors, strict=True):
        total = total + lora_penalty(layer.A, layer.B, U, c, layer.scaling)
    total.backward()


def naive(penalty: AlignmentPenalty, factors: Factors) -> None:
    """((I - C) B) A written out, out x in, and autograd."""
    total = 0
    for layer, (U, c) in zip(penalty.layers, factors, strict=True):
        Z = orthogonal_part(layer.B.float(), U.float(), c)
        total = total + (layer.scaling * Z @ layer.A.float()).square().sum()
    total.backward()


def literal_projectors(factors: Factors) -> list[torch.Tensor]:
    """C of every layer, out x out."""
    return [(U.float() * c) @ U.float().T for U, c in factors]


def projector_of(penalty: AlignmentPenalty, layer: FoundLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """U and c of a layer, where its factors are."""
    U, c = penalty.direction.modules[layer.name].projector(penalty.projector, penalty.rank)
    return U.to(layer.A.device), c.to(layer.A.device)


def authors(penalty: AlignmentPenalty, projectors: list[torch.Tensor]) -> None:
    """||dW - C dW||^2 with dW = B A, out x in, and C, out x out: AsFT's and Safe LoRA's formula as it is written."""
    total = 0
    for layer, C in zip(penalty.layers, projectors, strict=True):
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
                "what": f"{over} = {value}", "over": over, "at": value, "seconds": seconds,
                "model": operations(penalty),
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


def groups(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of one penalty over what a group of layers may take: `layer_groups.may_take` is chosen by it."""
    lines = []
    for name, layers in (("1B", 16), ("7B", 8)):
        for sketch in (0, 256):
            penalties = {}
            for megabytes in (24, 64, 128, 256):
                with mock.patch.object(layer_groups, "may_take", lambda most=megabytes * 2**20: most):
                    penalty = random_penalty(SHAPES[name], layers, 16, 64, sketch, asked.device)
                with Counter() as counted:
                    penalty.add_gradient()
                penalties[megabytes] = penalty, counted.peak
            functions = {str(megabytes): penalty.add_gradient for megabytes, (penalty, _) in penalties.items()}
            seconds = in_turns(functions, 9, asked.device)
            metric = f"fisher, {sketch} columns" if sketch else "weights, k = 64"
            lines += [
                {
                    "what": f"{name}, {layers} decoder layers, {metric}, {megabytes} MB",
                    "seconds": seconds[str(megabytes)],
                    "temporaries": peak,
                    "groups": len(penalty.groups),
                }
                for megabytes, (penalty, peak) in penalties.items()
            ]
    return lines


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
    found = [_python("-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}").split() for _ in range(9)]
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
