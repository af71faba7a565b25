"""Two models in, one alignment direction out: d = W_aligned - W_base, one layer at a time."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from axolotl_asft import __version__, fingerprint
from axolotl_asft.checkpoint import dtype_named
from axolotl_asft.devices import devices_named, spread
from axolotl_asft.direction import AlignmentDirection, Metric, ModuleDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.hub import hub_model
from axolotl_asft.metrics import LayerMetric, ModelMetric
from axolotl_asft.partial import Parts
from axolotl_asft.rank_rule import rank_rule
from axolotl_asft.readahead import read_ahead
from axolotl_asft.sources import Source, open_source
from axolotl_asft.spec import fault_of_own_answers, fault_of_texts
from axolotl_asft.subspace import EXACT_UP_TO, OVERSAMPLING, POWER_ITERATIONS, LowRank, Subspace, leading_subspace

LOG = logging.getLogger("axolotl.asft")

DEFAULT_RANK = 64
DEFAULT_TOLERANCE = 0.01
SVD = {"exact_up_to": EXACT_UP_TO, "oversampling": OVERSAMPLING, "power_iterations": POWER_ITERATIONS}
Ask = Callable[[], tuple[Sequence[ModelMetric], Sequence[tuple[str, str]]]]  # gives metrics and own answers
UNUSUAL = 0.4  # of ||W||: alignment changes a few percent of a large model, of the demo's small one 29


@dataclass(frozen=True)
class _Settings:
    """How a difference is decomposed."""

    rank: int | Literal["full"] | None
    tolerance: float
    energy: float | None
    max_rank: int | None
    dtype: torch.dtype
    keep_v: bool
    seed: int


@dataclass(frozen=True)
class _Layer:
    """One layer, read, with what the spec says of the models as far as they were read."""

    name: str
    weights: dict[str, Tensor]
    models: dict[str, dict[str, Any]]
    finished: AlignmentDirection | None


def extract_direction(
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    rank: int | Literal["full"] | None = DEFAULT_RANK,
    *,
    adapter: str | Path | None = None,
    output: str | Path | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    energy: float | None = None,
    max_rank: int | None = None,
    modules: list[str] | None = None,
    dtype: str = "bfloat16",
    keep_v: bool = False,
    metrics: Sequence[ModelMetric] | Ask = (),
    own_answers: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> AlignmentDirection:
    """The leading singular directions of d = W_aligned - W_base for the linear layers of a model.

    Reads the next pair while one is decomposed, and subtracts in fp32: memory holds two pairs, a decomposition, and the
    result if there is no `output`; with several GPUs, up to three pairs for each.

    Args:
        base, aligned: checkpoints in safetensors, single file or sharded: local folders, or on the Hub
            `owner/name[@revision]`, read tensor by tensor where they are not in its cache.
        rank: directions kept per layer; "full": all; None: the smallest rank whose recorded bound is within
            `tolerance` (the relative error of the `paper` penalty, as a share of ||dW||^2), or the smallest with a
            share `energy` of ||d||^2 where that is given.
        adapter: a PEFT LoRA adapter that is the difference itself, in place of `base` or of `aligned`.
        output: write to this direction file. Finished layers are kept beside it until it is complete, so that after
            any interruption the same call resumes where it stopped.
        max_rank: with rank=None, an upper limit on the directions kept; the recorded bound says what it costs.
        modules: regular expressions of module names; default: every linear weight of the decoder layers.
        dtype: data type of the stored vectors: "bfloat16", "float16" or "float32".
        keep_v: keep the right singular vectors too.
        metrics: metrics of the aligned model on safety prompts (`axolotl_asft.metrics`), stored for metric="fisher" and
            metric="activations". Or what asks the model for them and for its own answers, called when nothing else is
            wrong and no other extraction can begin on `output`.
        own_answers: pairs (request as the aligned model reads it, its answer), stored for anchor_weight; from
            `axolotl_asft.evaluation.safety_metrics`, like the metrics.
        seed: seed of the randomised SVD; the same inputs and seed give the same direction.
        device: where the linear algebra runs: "cpu", "cuda" (every GPU), or some of them: "cuda:0,cuda:1".
        progress: show a progress bar with the time left on the terminal.

    Raises:
        AsftError: a checkpoint that cannot be read, a pair that does not fit together, non-finite weights, or
            no difference at all.
    """
    rule, devices = rank_rule(rank, tolerance, energy, max_rank), devices_named(device)
    settings = _Settings(rank, tolerance, energy, max_rank, dtype_named(dtype), keep_v, seed)
    source = open_source(base, aligned, adapter, modules)
    _refuse(fault_of_texts(source.entries))
    output = None if output is None else Path(output).expanduser()
    with nullcontext() if output is None else Parts.open(output, source.names) as parts:
        if callable(metrics):
            metrics, own_answers = metrics()
            if aligned is not None and hub_model(aligned) is not None:
                source = open_source(base, aligned, adapter, modules)  # now it is in the Hub's cache
        turns = [list(turn) for turn in own_answers]
        recipe = {
            "rank": rule,
            "svd": SVD | {"seed": seed},
            **({"metrics": {m.name: {"answers": m.answers, "scale": m.scale} for m in metrics}} if metrics else {}),
            **({"own_answers": turns} if turns else {}),
            "tool": f"axolotl-asft {__version__}",
        }
        _check_metrics(metrics, source.names)
        _refuse(fault_of_own_answers(turns))
        if output is None or parts is None:
            return _extract(source, settings, recipe, metrics, None, devices, progress)
        stored = {"dtype": dtype, "keep_v": keep_v, "device": device, "metrics": _digest(metrics)}
        parts.resume(recipe | source.entries | stored | {"modules": source.names, "torch": torch.__version__})
        _extract(source, settings, recipe, metrics, parts, devices, progress).save(output)
        parts.remove()
    return AlignmentDirection.load(output)


def _refuse(fault: str | None) -> None:
    if fault:
        raise AsftError(f"the direction file would have {fault}")


def _extract(
    source: Source,
    settings: _Settings,
    recipe: dict[str, Any],
    metrics: Sequence[ModelMetric],
    parts: Parts | None,
    devices: list[str],
    progress: bool,
) -> AlignmentDirection:
    """All layers, decomposed while the next are read; kept in `parts` where there is one."""
    modules: dict[str, ModuleDirection] = {}
    entries: dict[str, dict[str, Any]] = {}
    blocks: dict[str, str] = {}
    models: dict[str, dict[str, Any]] = {}
    squared_norms = [0.0, 0.0]  # of d, of the aligned weights

    def decomposed(layer: _Layer, device: str) -> tuple[AlignmentDirection, float]:
        squared_norm = source.squared_norm(layer.name, layer.weights)
        if layer.finished is not None:
            return layer.finished, squared_norm
        difference = source.difference(layer.name, layer.weights, device)
        layer.weights.clear()  # they need not stay while the difference is decomposed
        module, entry = _decomposed(layer.name, difference, settings, metrics)
        spec = recipe | layer.models | {"modules": {layer.name: entry}, "created": _now()}
        return AlignmentDirection({layer.name: module}, spec), squared_norm

    reading = closing(read_ahead(_layers(source, parts)))
    with (
        _progress_bar(len(source.names), progress) as advance,
        reading as layers,
        closing(spread(layers, decomposed, devices)) as done,
    ):
        for layer, (part, squared_norm) in done:
            if parts is not None and layer.finished is None:
                parts.keep(layer.name, part)
            models, entries[layer.name] = layer.models, part.spec["modules"][layer.name]
            blocks |= models["aligned"]["fingerprint"]["blocks"]
            squared_norms[0] += float(part.modules[layer.name].norm.double()) ** 2
            squared_norms[1] += squared_norm
            if parts is None:
                modules |= part.modules
            advance(layer.name)
    relative = (squared_norms[0] / squared_norms[1]) ** 0.5 if squared_norms[1] > 0 else 0.0
    if parts is not None and not 0 < relative <= 1:
        parts.remove()  # there is nothing to go on with
    _check_difference(relative, models)
    models["aligned"]["fingerprint"]["blocks"] = blocks
    spec = recipe | models | {"relative_norm": relative, "modules": entries, "created": _now()}
    return AlignmentDirection(modules if parts is None else parts, spec)


def _layers(source: Source, parts: Parts | None) -> Iterator[_Layer]:
    """Every layer, in order, read and hashed."""
    digests = {side: hashlib.sha256() for side in source.checkpoints}
    for name in source.names:
        yield _layer(source, name, digests, parts)


def _layer(source: Source, name: str, digests: dict[str, "hashlib._Hash"], parts: Parts | None) -> _Layer:
    weights = {}
    models = {key: dict(entry) for key, entry in source.entries.items()}
    for side, digest in digests.items():
        stored_name = source.stored_names[side][name]
        weights[side] = source.checkpoints[side].weight(stored_name)
        _update_hash(digest, stored_name, weights[side])
        models[side]["sha256"] = digest.hexdigest()
    models["aligned"]["fingerprint"] = {"scheme": fingerprint.SCHEME, "blocks": {name: source.block(name, weights)}}
    finished = parts.finished(name, models) if parts is not None else None
    return _Layer(name, weights, models, finished)


def _decomposed(
    name: str, difference: Tensor | LowRank, settings: _Settings, metrics: Sequence[ModelMetric]
) -> tuple[ModuleDirection, dict[str, Any]]:
    """The direction of one layer, and its entry in the spec."""
    rank = settings.rank
    subspace = leading_subspace(
        difference,
        min(difference.shape) if rank == "full" else rank,
        None if settings.energy else settings.tolerance,
        settings.dtype,
        settings.seed,
        settings.energy,
        settings.max_rank,
    )
    held = {metric.name: metric.layers[name] for metric in metrics if name in metric.layers}
    factors = {kind: _metric(layer, difference, settings.dtype) for kind, layer in held.items()}
    V = subspace.V.cpu() if settings.keep_v else None
    module = ModuleDirection(
        subspace.U.cpu(), subspace.S.cpu(), subspace.norm.cpu(), difference.shape[1], V, metrics=factors
    )
    entry = _module_entry(subspace, difference.shape)
    if held:
        entry["metrics"] = {kind: _metric_entry(layer) for kind, layer in held.items()}
    return module, entry


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _update_hash(digest: "hashlib._Hash", name: str, weight: Tensor) -> None:
    digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}|".encode())
    digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _module_entry(subspace: Subspace, shape: torch.Size) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "k": subspace.rank,
        "energy": subspace.energy,
        "bound": subspace.bound,
        "method": subspace.method,
    }


def _metric(layer: LayerMetric, difference: Tensor | LowRank, dtype: torch.dtype) -> Metric:
    X, Y = layer.X.to(dtype).contiguous(), layer.Y  # however they lie in memory, products add in the same order
    on = difference.A.device if isinstance(difference, LowRank) else difference.device
    product = (difference @ X.float().to(on)).cpu()
    if Y is not None:
        Y = Y.to(dtype).contiguous()
        product = Y.float().T @ product
    return Metric(X, torch.linalg.matrix_norm(product), Y)


def _metric_entry(layer: LayerMetric) -> dict[str, Any]:
    outputs = {} if layer.Y is None else {"outputs": layer.Y.shape[1]}
    return {"inputs": layer.X.shape[1], **outputs, "energy": layer.energy}


def _check_metrics(metrics: Sequence[ModelMetric], names: Sequence[str]) -> None:
    """A wrapper's loader may name the layers otherwise than its checkpoint: the metric would be left out, unsaid."""
    for metric in metrics:
        if not any(name in metric.layers for name in names):
            found = next(iter(metric.layers), "none")
            raise AsftError(
                f"the metric {metric.name} is for layers such as {found}, but the checkpoint's are called {names[0]}: "
                "the model is loaded under other names, as a text model of a wrapper may be; make the direction "
                "without --metric"
            )


def _digest(metrics: Sequence[ModelMetric]) -> dict[str, str]:
    """Metric -> sha256 of its factors."""
    found = {}
    for metric in metrics:
        digest = hashlib.sha256()
        for name, layer in sorted(metric.layers.items()):
            for factor in (layer.X, layer.Y):
                if factor is not None:
                    _update_hash(digest, name, factor)
        found[metric.name] = digest.hexdigest()
    return found


def _check_difference(relative: float, models: dict[str, dict[str, Any]]) -> None:
    base, aligned = models["base"]["id"], models["aligned"]["id"]
    if relative == 0:
        raise AsftError(
            f"{base} and {aligned} have the same weights, so there is no alignment direction; give the base "
            "model that the aligned one was made from"
        )
    if relative > UNUSUAL:
        differ = (
            f"{base} and {aligned} differ by {relative:.0%} of the weights' norm; a base and its aligned model differ "
            "by a few percent; check that they belong together"
        )
        if relative > 1:
            raise AsftError(differ)
        LOG.warning("%s", differ)


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[module]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("extracting", total=total, module="")
        yield lambda name: bar.update(task, advance=1, module=name)
