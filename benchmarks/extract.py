"""How fast, and in how much memory, is a direction made? Beside a full SVD of every difference, and the authors' way.

    python benchmarks/extract.py [--folder FOLDER] [--models 135M 1B 7B]

Random pairs of checkpoints of the shapes of three models, bf16, are written to a temporary folder (5 GB; of the 7B
model one decoder layer). The difference has singular values that fall like i^-0.8 over 256 directions, 2 % of ||W||,
under the rounding of both checkpoints to bf16. Each way runs in a process of its own, on one thread, in turns with the
others; what takes too long is done once a shape and multiplied. Writes benchmarks/results/extract.md.
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

RESULT = Path(__file__).parent / "results" / "extract.md"
RAW = RESULT.with_suffix(".json")  # model -> what was measured, so that one can be measured again
RANK = 64


@dataclass(frozen=True)
class Model:
    """Shapes of a Llama.

    Attributes:
        layers: of the whole model; written: how many of them are.
    """

    title: str
    hidden: int
    inner: int
    key_value: int
    layers: int
    written: int
    rounds: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        h, i, kv = self.hidden, self.inner, self.key_value
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        return {f"self_attn.{k}": v for k, v in attention.items()} | {
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
        }  # fmt: skip


MODELS = {
    "135M": Model("SmolLM2-135M", 576, 1536, 192, layers=30, written=30, rounds=1),
    "1B": Model("Llama-3.2-1B", 2048, 8192, 512, layers=16, written=16, rounds=1),
    "7B": Model("Llama-2-7B", 4096, 11008, 4096, layers=32, written=1, rounds=1),
}


# ------------------------------------------------------------------------------------------------ checkpoints
def write(base: str, aligned: str) -> None:
    """Base and aligned, a file a decoder layer; the folder above them says which model's shapes."""
    pair = Path(base), Path(aligned)
    model = next(model for model in MODELS.values() if model.title == pair[0].parent.name)
    weight_map = {}
    for layer in range(model.written):
        tensors: tuple[dict, dict] = {}, {}
        for number, (part, (rows, columns)) in enumerate(model.shapes().items()):
            generator = torch.Generator().manual_seed(100 * layer + number)
            base = 0.02 * torch.randn(rows, columns, generator=generator)
            values = torch.arange(1, 257) ** -0.8
            left = torch.randn(rows, 256, generator=generator) * values
            d = left @ torch.randn(256, columns, generator=generator)
            aligned = base + d * (0.02 * base.norm() / d.norm())
            name = f"model.layers.{layer}.{part}.weight"
            for side, weight in zip(tensors, (base, aligned), strict=True):
                side[name] = weight.bfloat16()
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


def full_svd(base: str, aligned: str, names: str) -> None:
    """A loop over the matrices: load, subtract, decompose, keep the leading ones."""
    checkpoints = [Checkpoint.open(folder) for folder in (base, aligned)]
    kept = {}
    for name in names.split(","):
        first, second = (checkpoint.weight(name).float() for checkpoint in checkpoints)
        U, S, _ = torch.linalg.svd(second - first, full_matrices=False)
        kept[name] = U[:, :RANK].bfloat16(), S[:RANK].clone()


def authors(base: str, aligned: str, names: str) -> None:
    """Both models whole in fp32, and C = d d^T / ||d|| of every matrix, out x out."""
    checkpoints = [Checkpoint.open(folder) for folder in (base, aligned)]
    models = [{name: checkpoint.weight(name).float() for name in names.split(",")} for checkpoint in checkpoints]
    kept = {}
    for name in names.split(","):
        d = models[1][name] - models[0][name]
        kept[name] = d @ d.T / d.norm()


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


def child(way: str, arguments: str) -> None:
    """Run one way; print what it took."""
    torch.set_num_threads(1)
    options = json.loads(arguments)
    imports = peak_memory()
    started, processor = time.monotonic(), time.process_time()
    result = WAYS[way](**options)
    took = {"seconds": time.monotonic() - started, "processor": time.process_time() - processor}
    print(json.dumps((result or {}) | took | {"peak": peak_memory(), "imports": imports}))


def run(way: str, pair: tuple[Path, Path], **options) -> dict:
    arguments = {"base": str(pair[0]), "aligned": str(pair[1])} | options
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", way, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict = json.loads(done.stdout.splitlines()[-1])
    peak = f"{result['peak'] / 2**20:.0f} MiB"
    took = f"{result['seconds']:.1f} s, {result['processor']:.1f} s of processor, {peak}"
    print(f"{pair[0].parent.name}: {way} {options.get('names', '')} {took}", file=sys.stderr, flush=True)
    return result


# ------------------------------------------------------------------------------------------------------ measuring
def measure(model: Model, folder: Path) -> dict:
    """All ways on one model; seconds of the whole model, multiplied where they were not all run."""
    pair = folder / model.title / "base", folder / model.title / "aligned"
    run("write", pair)
    whole, shapes = model.layers / model.written, model.shapes()
    names = {tuple(sorted(shape)): f"model.layers.0.{part}" for part, shape in shapes.items()}
    counts = Counter(tuple(sorted(shape)) for shape in shapes.values())
    output = folder / "direction.safetensors"
    made, reading, loops = [], [], []
    for turn in range(max(model.rounds, len(names))):
        if turn < model.rounds:
            reading.append(run("read", pair))
            made.append(run("ours", pair, output=str(output)))
            output.unlink()
        for shape, name in list(names.items())[turn : turn + 1]:
            loops.append((counts[shape] * model.layers, run("full_svd", pair, names=name)))
    dense = run("authors", pair, names=",".join(f"model.layers.0.{part}" for part in shapes))
    found = {
        "title": model.title,
        "layers": model.layers,
        "pair": reading[0]["bytes"] * whole,
        "peak": max(each["peak"] for each in made),
        "imports": max(each["imports"] for each in made),
        "svd_peak": max(each["peak"] for _, each in loops),
        "authors_memory": 4 * model.layers * sum(rows**2 + 2 * rows * columns for rows, columns in shapes.values()),
        "U": made[0]["bytes"] * whole,
    }
    for clock in ("seconds", "processor"):
        found[clock] = {
            "ours": statistics.median(each[clock] for each in made) * whole,
            "reading": statistics.median(each[clock] for each in reading) * whole,
            "svd": sum(times * each[clock] for times, each in loops),
            "authors": dense[clock] * model.layers,
        }
    if model.written == 1:
        found["UV"] = run("ours", pair, output=str(output), keep_v=True)["bytes"] * whole
        output.unlink()
        found["one_percent"] = run("ours", pair, output=str(output), rank=None, tolerance=0.01, max_rank=256)
        found["tolerance"] = found["one_percent"]["bytes"] * whole
    return found


def report(results: list[dict]) -> str:
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"
    )
    lines = [
        "# Making a direction: time, memory, size\n",
        f"`python benchmarks/extract.py` on {machine}, which did other things too (so processor time stands "
        f"beside the wall's); every process on one thread, rank {RANK}.\n",
        "| shapes of | pair | clock | this | full-SVD loop | ratio | authors' way | reading both | this / reading |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        for clock, word in (("seconds", "wall"), ("processor", "processor")):
            took = found[clock]
            lines.append(
                f"| {found['title']}, {found['layers']} layers | {found['pair'] / 1e9:.1f} GB | {word} | "
                f"{took['ours']:.0f} s | {took['svd']:.0f} s | {took['svd'] / took['ours']:.1f} | "
                f"{took['authors']:.0f} s | {took['reading']:.1f} s | {took['ours'] / took['reading']:.0f} |"
            )
    lines += [
        "\n| shapes of | peak memory of this | of which Python and torch | of the full-SVD loop | authors' way keeps |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        lines.append(
            f"| {found['title']} | {found['peak'] / 2**20:.0f} MiB | {found['imports'] / 2**20:.0f} MiB | "
            f"{found['svd_peak'] / 2**20:.0f} MiB | {found['authors_memory'] / 2**30:.1f} GiB |"
        )
    lines += [
        f"\n| shapes of | U at rank {RANK} | U and V | 1 % tolerance, at most 256 | directions then | bound then |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in results:
        if "one_percent" in found:
            ranks, bounds = found["one_percent"]["ranks"], found["one_percent"]["bounds"]
            lines.append(
                f"| {found['title']} | {found['U'] / 1e6:.0f} MB | {found['UV'] / 1e6:.0f} MB | "
                f"{found['tolerance'] / 1e6:.0f} MB | {min(ranks)} to {max(ranks)}, median "
                f"{statistics.median(ranks):.0f} | {max(bounds):.2g} |"
            )
    return "\n".join([*lines, "", NOTES, ""])


NOTES = """\
- this: `extract_direction(..., output=...)`, from opening the checkpoints to the verified file. Of the 7B model one
  decoder layer was made and multiplied by 32; of the others all layers.
- full-SVD loop: load, subtract, `torch.linalg.svd`, keep the leading ones; one matrix of every shape, multiplied by how
  many there are.
- authors' way: both models in memory in fp32, and d d^T / ||d|| of every matrix; one decoder layer, multiplied. What it
  keeps is counted, not measured: two fp32 copies and an out x out matrix for each.
- reading both: once, from disk, not from the operating system's cache.
- peak memory: the most that the process had resident, with the pages of the checkpoints that are mapped at the time.
- at the shapes of SmolLM2-135M every decomposition is exact (smaller side up to 1536), as the loop's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written  [default: a temporary one]")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    torch.set_num_threads(1)
    known = json.loads(RAW.read_text()) if RAW.exists() else {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            known[name] = measure(MODELS[name], Path(folder))
        atomic_write_text(RAW, json.dumps(known, indent=1) + "\n")
    text = report([known[name] for name in MODELS if name in known])
    print(text)
    atomic_write_text(RESULT, text)
    return None


if __name__ == "__main__":
    main()
