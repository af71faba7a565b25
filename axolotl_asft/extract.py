"""Two checkpoints in, one alignment direction out: d = W_aligned - W_base, one pair of tensors at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from axolotl_asft import __version__, fingerprint
from axolotl_asft.checkpoint import Checkpoint, dtype_named
from axolotl_asft.direction import AlignmentDirection, Metric, ModuleDirection, select_modules
from axolotl_asft.errors import AsftError
from axolotl_asft.metrics import LayerMetric
from axolotl_asft.subspace import EXACT_UP_TO, OVERSAMPLING, POWER_ITERATIONS, Subspace, leading_subspace

DEFAULT_RANK = 64
DEFAULT_TOLERANCE = 0.01


def extract_direction(
    base: str | Path,
    aligned: str | Path,
    rank: int | Literal["full"] | None = DEFAULT_RANK,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    energy: float | None = None,
    max_rank: int | None = None,
    modules: list[str] | None = None,
    dtype: str = "bfloat16",
    keep_v: bool = False,
    metrics: Sequence[LayerMetric] = (),
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> AlignmentDirection:
    """The leading singular directions of d = W_aligned - W_base for the linear layers of a model.

    Reads one pair of tensors at a time and subtracts in fp32: memory holds the largest pair, its
    decomposition and the result, however large the model.

    Args:
        base, aligned: checkpoints in safetensors, single file or sharded: local folders, or on the Hub
            `owner/name[@revision]`, read tensor by tensor where they are not in its cache.
        rank: directions kept per layer; "full": all; None: the smallest rank whose recorded bound is within
            `tolerance` (the relative error of the `paper` penalty, as a share of ||dW||^2), or the smallest with a
            share `energy` of ||d||^2 where that is given.
        max_rank: with rank=None, never more directions than this; the recorded bound says what that costs.
        modules: regular expressions of module names; default: every linear weight of the decoder layers.
        dtype: of the stored vectors, "bfloat16", "float16" or "float32".
        keep_v: keep the right singular vectors too.
        metrics: of the aligned model on safety prompts (`axolotl_asft.metrics`), kept for metric="fisher" and its like.
        seed: of the randomised decomposition; the same inputs and seed give the same direction.
        device: where the algebra runs, "cpu" or "cuda".
        progress: show a progress bar with the time left on the terminal.

    Raises:
        AsftError: a checkpoint that cannot be read, a pair that does not fit together, non-finite weights, or
            no difference at all.
    """
    rule = _rank_rule(rank, tolerance, energy, max_rank)
    _check_device(device)
    stored_dtype = dtype_named(dtype)
    base_checkpoint, aligned_checkpoint = Checkpoint.open(base), Checkpoint.open(aligned)
    names = _paired_modules(base_checkpoint, aligned_checkpoint, modules)
    hashes = hashlib.sha256(), hashlib.sha256()
    directions: dict[str, ModuleDirection] = {}
    entries: dict[str, dict[str, Any]] = {}
    blocks: dict[str, str] = {}
    squared_weight_norm = 0.0
    with _progress_bar(len(names), progress) as advance:
        for name in names:
            base_weight, aligned_weight = base_checkpoint.weight(name), aligned_checkpoint.weight(name)
            for digest, weight in zip(hashes, (base_weight, aligned_weight), strict=True):
                _update_hash(digest, name, weight)
            blocks[name] = fingerprint.encode_block(name, aligned_weight)
            difference = aligned_weight.to(device, torch.float32) - base_weight.to(device, torch.float32)
            if not torch.isfinite(difference).all():
                raise AsftError(f"{name}: the difference holds NaN or infinity; check both checkpoints' weights")
            squared_weight_norm += float(aligned_weight.float().square().sum(dtype=torch.float64))
            wanted = None if rank is None else min(difference.shape) if rank == "full" else rank
            subspace = leading_subspace(
                difference, wanted, None if energy else tolerance, stored_dtype, seed, energy, max_rank
            )
            directions[name] = _module_direction(subspace, difference.shape[1], keep_v)
            entries[name] = _module_entry(subspace, difference.shape)
            if held := [metric for metric in metrics if name in metric.inputs]:
                factors = {metric.name: _metric(metric, name, difference, stored_dtype) for metric in held}
                directions[name] = replace(directions[name], metrics=factors)
                entries[name]["metrics"] = {metric.name: _metric_entry(metric, name) for metric in held}
            advance(name)
    _check_difference(directions, squared_weight_norm, base_checkpoint, aligned_checkpoint)
    spec = {
        "base": _model_entry(base_checkpoint, names, hashes[0].hexdigest()),
        "aligned": {
            **_model_entry(aligned_checkpoint, names, hashes[1].hexdigest()),
            "fingerprint": {"scheme": fingerprint.SCHEME, "blocks": blocks},
        },
        "relative_norm": _relative_norm(directions, squared_weight_norm),
        "rank": rule,
        "svd": {
            "exact_up_to": EXACT_UP_TO,
            "oversampling": OVERSAMPLING,
            "power_iterations": POWER_ITERATIONS,
            "seed": seed,
        },
        "modules": entries,
        **({"metrics": {m.name: {"answers": m.answers, "scale": m.scale} for m in metrics}} if metrics else {}),
        "tool": f"axolotl-asft {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return AlignmentDirection(modules=directions, spec=spec)


def _rank_rule(rank: int | str | None, tolerance: float, energy: float | None, max_rank: int | None) -> dict[str, Any]:
    """The rule that chooses k, as the spec says it; refuses one that is none."""
    if rank != "full" and rank is not None and (not isinstance(rank, int) or rank < 1):
        raise AsftError(f"rank is {rank!r}; expected a positive number, 'full', or None with a tolerance or an energy")
    if rank is not None and (energy is not None or max_rank is not None):
        raise AsftError(f"rank is {rank!r}; energy and max_rank go with rank None (auto)")
    if rank is None and not tolerance > 0:
        raise AsftError(f"tolerance is {tolerance!r}; expected a positive number")
    if energy is not None and not 0 < energy <= 1:
        raise AsftError(f"energy is {energy!r}; expected a share, above 0 and at most 1")
    if max_rank is not None and max_rank < 1:
        raise AsftError(f"max_rank is {max_rank!r}; expected a positive number")
    if isinstance(rank, int):
        return {"rule": "fixed", "k": rank}
    if rank is not None:
        return {"rule": "full"}
    most = {} if max_rank is None else {"max_rank": max_rank}
    return (
        {"rule": "tolerance", "tolerance": tolerance} if energy is None else {"rule": "energy", "energy": energy}
    ) | most


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise AsftError(f"device is {device!r}; expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise AsftError(f"device is {device!r}, but torch sees no GPU here; use cpu")


def _paired_modules(base: Checkpoint, aligned: Checkpoint, patterns: list[str] | None) -> list[str]:
    """The modules to decompose: matched by whole name, present in both with one shape."""
    base_shapes, aligned_shapes = base.linear_weights(), aligned.linear_weights()
    if not aligned_shapes:
        raise AsftError(
            f"{aligned.location} has no linear weights in numbered decoder layers; its tensors are called like "
            f"{next(iter(aligned.shapes), 'nothing')}"
        )
    names = sorted(aligned_shapes, key=_natural_order)
    if patterns:
        names = select_modules(names, patterns)
    missing = [name for name in names if name not in base_shapes]
    if missing:
        raise AsftError(
            f"{len(missing)} of {len(names)} layers of {aligned.name} are not in {base.name}, the first {missing[0]}; "
            "expected a base and an aligned model of one architecture"
        )
    for name in names:
        if base_shapes[name] != aligned_shapes[name]:
            raise AsftError(
                f"{name} is {aligned_shapes[name]} in {aligned.name} and {base_shapes[name]} in {base.name}; expected "
                "a base and an aligned model of one architecture"
            )
    return names


def _natural_order(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))


def _update_hash(digest: "hashlib._Hash", name: str, weight: torch.Tensor) -> None:
    digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}|".encode())
    digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _module_direction(subspace: Subspace, in_features: int, keep_v: bool) -> ModuleDirection:
    V = subspace.V.cpu() if keep_v else None
    return ModuleDirection(subspace.U.cpu(), subspace.S.cpu(), subspace.norm.cpu(), in_features, V)


def _module_entry(subspace: Subspace, shape: torch.Size) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "k": subspace.rank,
        "energy": subspace.energy,
        "bound": subspace.bound,
        "method": subspace.method,
    }


def _metric(metric: LayerMetric, name: str, difference: torch.Tensor, dtype: torch.dtype) -> Metric:
    X, Y = metric.inputs[name].to(dtype), metric.outputs.get(name)
    product = difference.cpu() @ X.float()
    if Y is not None:
        Y = Y.to(dtype)
        product = Y.float().T @ product
    return Metric(X, torch.linalg.matrix_norm(product), Y)


def _metric_entry(metric: LayerMetric, name: str) -> dict[str, Any]:
    outputs = {"outputs": metric.outputs[name].shape[1]} if name in metric.outputs else {}
    return {"inputs": metric.inputs[name].shape[1], **outputs, "energy": metric.energy[name]}


def _model_entry(checkpoint: Checkpoint, names: list[str], sha256: str) -> dict[str, Any]:
    return {
        "id": checkpoint.name,
        "revision": checkpoint.revision,
        "sha256": sha256,
        "read_as": "safetensors " + ", ".join(sorted({checkpoint.dtypes[f"{name}.weight"] for name in names})),
    }


def _relative_norm(directions: dict[str, ModuleDirection], squared_weight_norm: float) -> float:
    squared = sum(float(direction.norm.double()) ** 2 for direction in directions.values())
    return (squared / squared_weight_norm) ** 0.5 if squared_weight_norm > 0 else 0.0


def _check_difference(
    directions: dict[str, ModuleDirection], squared_weight_norm: float, base: Checkpoint, aligned: Checkpoint
) -> None:
    relative = _relative_norm(directions, squared_weight_norm)
    if relative == 0:
        raise AsftError(
            f"{base.name} and {aligned.name} have the same weights, so there is no alignment direction; give the base "
            "model that the aligned one was made from"
        )
    if relative > 1:
        raise AsftError(
            f"{base.name} and {aligned.name} differ by {relative:.0%} of the weights' norm; a base and its aligned "
            "model differ by a few percent; check that they belong together"
        )


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[module]}")) as bar:
        task = bar.add_task("extracting", total=total, module="")
        yield lambda name: bar.update(task, advance=1, module=name)
