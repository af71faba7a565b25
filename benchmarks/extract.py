"""How fast, and in how much memory, is a direction made? Beside a full SVD of every difference, and the authors' way.

    python -m benchmarks.extract [--folder FOLDER] [--models 135M 1B 7B] [--device cuda]

Random pairs of checkpoints of the shapes of three models, bf16, are written to a temporary folder (5 GB; of the 7B
model one decoder layer, for a GPU eight: 7 GB). The difference has singular values that fall like i^-0.8 over 256
directions, 2 % of ||W||, under the rounding of both checkpoints to bf16. Each way runs in a process of its own, on one
thread, or all of them on the same GPU, in turns with the others; what takes too long is done once a shape and
multiplied. Writes benchmarks/results/extract.md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from axolotl_asft import extract_direction
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.files import atomic_write_text
from benchmarks.extract_table import report
from benchmarks.measuring import wait

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "extract.md"
RAW = RESULT.with_suffix(".json")  # model -> what was measured, so that one can be measured again
RANK = 64


@dataclass(frozen=True)
class Model:
    """Shapes of a Llama.

    Attributes:
        layers: of the whole model; written: how many of them are, for a CPU and for a GPU.
    """

    title: str
    hidden: int
    inner: int
    key_value: int
    layers: int
    written: tuple[int, int]
    rounds: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        h, i, kv = self.hidden, self.inner, self.key_value
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        return {f"self_attn.{k}": v for k, v in attention.items()} | {
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
        }  # fmt: skip


MODELS = {
    "135M": Model("SmolLM2-135M", 576, 1536, 192, layers=30, written=(30, 30), rounds=1),
    "1B": Model("Llama-3.2-1B", 2048, 8192, 512, layers=16, written=(16, 16), rounds=1),
    "7B": Model("Llama-2-7B", 4096, 11008, 4096, layers=32, written=(1, 8), rounds=1),
}


# ------------------------------------------------------------------------------------------------ checkpoints
def write(base: str, aligned: str, layers: int, device: str) -> None:
    """Base and aligned, a file a decoder layer; the folder above them says which model's shapes."""
    pair = Path(base), Path(aligned)
    model = next(model for model in MODELS.values() if model.title == pair[0].parent.name)
    weight_map = {}
    for layer in range(layers):
        tensors: tuple[dict, dict] = {}, {}
        for number, (part, (rows, columns)) in enumerate(model.shapes().items()):
            random = {"generator": torch.Generator(device).manual_seed(100 * layer + number), "device": device}
            base = 0.02 * torch.randn(rows, columns, **random)
            values = torch.arange(1, 257, device=device) ** -0.8
            left = torch.randn(rows, 256, **random) * values
            d = left @ torch.randn(256, columns, **random)
            aligned = base + d * (0.02 * base.norm() / d.norm())
            name = f"model.layers.{layer}.{part}.weight"
            for side, weight in zip(tensors, (base, aligned), strict=True):
                side[name] = weight.bfloat16().cpu()
            weight_map[name] = f"model-{layer:05d}.safetensors"
        for where, side in zip(pair, tensors, strict=True):
            where.mkdir(parents=True, exist_ok=True)
            save_file(side, where / f"model-{layer:05d}.safetensors")
    for where in pair:
        (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.sync()


def forget(folder: Path) -> None:
    """Out of the operating system's cache, so that it is read from disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ------------------------------------------------------------------------- the ways, each in a process of its own
def ours(base: str, aligned: str, output: str, **options) -> dict:
    extract_direction(base, aligned, output=output, **({"rank": RANK} | options))
    size = Path(output).stat().st_size
    ranks = [entry["k"] for entry in spec_of(output)["modules"].values()]
    bounds = [entry["bound"] for entry in spec_of(output)["modules"].values()]
    return {"bytes": size, "ranks": ranks, "bounds": bounds}


def spec_of(output: str) -> dict:
    from safetensors import safe_open

    with safe_open(output, "pt") as file:
        return json.loads(file.metadata()["spec"])


def full_svd(base: str, aligned: str, names: str, device: str) -> None:
    """A loop over the matrices: load, subtract, decompose, keep the leading ones."""
    checkpoints = [Checkpoint.open(folder) for folder in (base, aligned)]
    kept = {}
    for name in names.split(","):
        first, second = (checkpoint.weight(name).to(device).float() for checkpoint in checkpoints)
        U, S, _ = torch.linalg.svd(second - first, full_matrices=False)
        kept[name] = U[:, :RANK].bfloat16().cpu(), S[:RANK].cpu().clone()


def authors(base: str, aligned: str, names: str, device: str) -> None:
    """Both models whole in fp32, and C = d d^T / ||d|| of every matrix, out x out."""
    checkpoints = [Checkpoint.open(folder) for folder in (base, aligned)]
    models = [
        {name: checkpoint.weight(name).to(device).float() for name in names.split(",")} for checkpoint in checkpoints
    ]
    kept = {}
    for name in names.split(","):
        d = models[1][name] - models[0][name]
        kept[name] = d @ d.T / d.norm()
    wait(device)


def read(base: str, aligned: str) -> dict:
    """Both checkpoints from disk, once."""
    total = 0
    for folder in (base, aligned):
        forget(Path(folder))
    for path in sorted(path for folder in (base, aligned) for path in Path(folder).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while block := file.read(2**24):
                total += len(block)
    return {"bytes": total}


WAYS = {way.__name__: way for way in (write, ours, full_svd, authors, read)}


def peak_memory() -> int:
    """Of this process, bytes. The peak that getrusage tells may be that of the process that started this one."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _warm_up(device: str) -> None:
    """What a process does once on its GPU: a context, cuBLAS and cuSOLVER."""
    if device != "cpu":
        matrix = torch.randn(64, 32, device=device)
        torch.linalg.svd(matrix @ matrix.T)
        torch.linalg.qr(matrix)
        torch.linalg.eigh(matrix.T @ matrix)
        wait(device)


def child(way: str, arguments: str) -> None:
    """Run one way; print what it took."""
    torch.set_num_threads(1)
    options = json.loads(arguments)
    device = options.get("device", "cpu")
    _warm_up(device)
    imports = peak_memory()
    started, processor = time.monotonic(), time.process_time()
    result = WAYS[way](**options)
    took = {"seconds": time.monotonic() - started, "processor": time.process_time() - processor}
    on_gpu = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    print(json.dumps((result or {}) | took | {"peak": peak_memory(), "imports": imports, "on_gpu": on_gpu}))


def run(way: str, pair: tuple[Path, Path], **options) -> dict:
    arguments = {"base": str(pair[0]), "aligned": str(pair[1])} | options
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.extract", "--child", way, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict = json.loads(done.stdout.splitlines()[-1])
    peak = f"{result['peak'] / 2**20:.0f} MiB"
    took = f"{result['seconds']:.1f} s, {result['processor']:.1f} s of processor, {peak}"
    print(f"{pair[0].parent.name}: {way} {options.get('names', '')} {took}", file=sys.stderr, flush=True)
    return result


# ------------------------------------------------------------------------------------------------------ measuring
def measure(model: Model, folder: Path, device: str) -> dict:
    """All ways on one model; seconds of the whole model, multiplied where they were not all run."""
    pair = folder / model.title / "base", folder / model.title / "aligned"
    written = model.written[device == "cuda"]
    kind, device = device, "cuda:0" if device == "cuda" else device  # one GPU, whatever there are
    run("write", pair, layers=written, device=device)
    whole, shapes = model.layers / written, model.shapes()
    names = {tuple(sorted(shape)): f"model.layers.0.{part}" for part, shape in shapes.items()}
    counts = Counter(tuple(sorted(shape)) for shape in shapes.values())
    output = folder / "direction.safetensors"
    made, reading, loops = [], [], []
    for turn in range(max(model.rounds, len(names))):
        if turn < model.rounds:
            reading.append(run("read", pair))
            made.append(run("ours", pair, output=str(output), device=device))
            output.unlink()
        for shape, name in list(names.items())[turn : turn + 1]:
            loops.append((counts[shape] * model.layers, run("full_svd", pair, names=name, device=device)))
    dense = run("authors", pair, names=",".join(f"model.layers.0.{part}" for part in shapes), device=device)
    found = {
        "machine": machine(kind),
        "device": kind,
        "title": model.title,
        "layers": model.layers,
        "pair": reading[0]["bytes"] * whole,
        "peak": max(each["peak"] for each in made),
        "imports": max(each["imports"] for each in made),
        "svd_peak": max(each["peak"] for _, each in loops),
        "authors_memory": 4 * model.layers * sum(rows**2 + 2 * rows * columns for rows, columns in shapes.values()),
        "on_gpu": max(each["on_gpu"] for each in made),
        "U": made[0]["bytes"] * whole,
    }
    for clock in ("seconds", "processor"):
        found[clock] = {
            "ours": statistics.median(each[clock] for each in made) * whole,
            "reading": statistics.median(each[clock] for each in reading) * whole,
            "svd": sum(times * each[clock] for times, each in loops),
            "authors": dense[clock] * model.layers,
        }
    if written == 1:
        found["UV"] = run("ours", pair, output=str(output), keep_v=True)["bytes"] * whole
        output.unlink()
        found["one_percent"] = run("ours", pair, output=str(output), rank=None, tolerance=0.01, max_rank=256)
        found["tolerance"] = found["one_percent"]["bytes"] * whole
    return found


def machine(device: str) -> str:
    chip = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return (
        f"{platform.machine()}, {chip}{os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written  [default: a temporary one]")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    torch.set_num_threads(1)
    known = json.loads(RAW.read_text()) if RAW.exists() else {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            key = name if arguments.device == "cpu" else f"{name} on a GPU"
            known[key] = measure(MODELS[name], Path(folder), arguments.device)
        atomic_write_text(RAW, json.dumps(known, indent=1) + "\n")
    text = report([known[key] for name in MODELS for key in (name, f"{name} on a GPU") if key in known], RANK)
    print(text)
    atomic_write_text(RESULT, text)
    return None


if __name__ == "__main__":
    main()
