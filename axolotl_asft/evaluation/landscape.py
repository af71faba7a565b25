"""The narrow safety basin: steps from the aligned weights along the alignment direction and off it, and their cost."""

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_asft import __version__
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.direction import AlignmentDirection, ModuleDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import HARMFUL_TASK, Interviewer
from axolotl_asft.evaluation.basin import KINDS, Point
from axolotl_asft.evaluation.basin_texts import Pairs, basin_texts
from axolotl_asft.evaluation.coherence import log_likelihoods
from axolotl_asft.evaluation.kept import hash_of
from axolotl_asft.evaluation.models import check_model, chosen_device, load_model, load_tokenizer
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.files import LOCK, atomic_write_text, locked, read_json, without_nan, writable_folder
from axolotl_asft.sources import CheckpointPair
from axolotl_asft.verify import verify_weights

LOG = logging.getLogger("axolotl.asft")
RADII = (0.5, 1.0, 2.0, 4.0, 8.0)


def perturbation(module: ModuleDirection, kind: str, generator: torch.Generator, d: Tensor | None = None) -> Tensor:
    """A matrix (out, in) of norm ||d||_F: +-d, or random inside or outside the span of U's columns.

    Args:
        module: U, and V where d is not given: then d ~ U diag(S) V^T, scaled to the norm of all of d.
        kind: one of `KINDS`.
        generator: of the Gaussian matrices.
        d: (out, in), the difference itself.
    """
    U = module.U.float()
    if kind in ("along", "against"):
        if d is None:
            assert module.V is not None
            d = (U * module.S.float()) @ module.V.float().T
        matrix = -d if kind == "against" else d
    else:
        gaussian = torch.randn(module.shape, generator=generator)
        inside = U @ (U.T @ gaussian)
        matrix = inside if kind == "inside" else gaussian - inside
    size = torch.linalg.matrix_norm(matrix)
    return matrix * (module.norm / size) if size > 0 else matrix


def measure_landscape(
    model: str,
    direction: AlignmentDirection,
    output: str | Path,
    base: str | Path | None = None,
    radii: tuple[float, ...] = RADII,
    seeds: int = 3,
    task: list[tuple[str, str]] | None = None,
    generate: bool = False,
    limit: int | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    stage: Stage = silent,
) -> list[Point]:
    """Perturb the aligned weights and measure refusals and task loss at each place.

    Written to `output`: landscape.json after every point, so that an interrupted measurement goes on, with the texts
    that it began with. Layers of which the direction keeps all directions stay as they are; `left_out` counts them.

    Args:
        model: the aligned model, folder or Hub id, not quantised.
        direction: of that model; with V, unless `base` is given.
        output: a folder.
        base: folder of the base model, for steps along d itself instead of what the direction keeps of it.
        radii: in units of ||d||_F of each layer, all layers at once.
        seeds: random directions of each kind.
        task: (prompt, answer) whose loss tells usefulness; default: the model's own answers to harmless prompts.
        generate: also ask every prompt, and count refusals.
        limit: prompts of each set.
        dtype: as for `load_model`; "auto" is float32 on a CPU. Steps are rounded to it, and how far that bent them is
            recorded.

    Raises:
        AsftError: a direction without V, of another model or of full rank in every layer, or a model that refuses
            nothing.
    """
    quieten_libraries()
    output = Path(output)
    check_model(model)
    writable_folder(output)
    moved = _moved(direction, base)
    device = chosen_device(device)
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    loaded, tokenizer = load_model(model, dtype, device=device), load_tokenizer(model)
    weights = _weights(loaded, moved)
    verify_weights(moved, ((name, weight, None) for name, weight in weights.items()))
    pair = _pair(base, model, direction) if base is not None else None
    interviewer = Interviewer(loaded, tokenizer, batch_size, max_new_tokens, name="the aligned model", stage=stage)
    ask: dict[str, Any] = {"split": "heldout", "limit": limit}
    settings: dict[str, Any] = {
        "model": model,
        "direction": {part: direction.spec[part]["sha256"] for part in ("base", "aligned")},
        "ranks": sorted({module.rank for module in moved.modules.values()}),
        "left_out": len(direction.modules) - len(moved.modules),
        "d": "exact" if base is not None else "as the direction keeps it",
        "prompts": hash_of([[p.prompt for p in load_prompts(s, **ask)] for s in ("harmful", "borderline")]),
        "task": hash_of(task),
        "template": hash_of(tokenizer.chat_template),
        "generate": generate,
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
        "max_new_tokens": max_new_tokens,
        "version": __version__,
    }
    busy = f"another landscape is measured in {output}; wait for it, or give another --output"
    with locked(output / LOCK, busy):
        texts, points = _kept(output / "landscape.json", settings)
        if texts is None:
            texts = basin_texts(model, interviewer, ask, task)
            _keep(output / "landscape.json", settings, texts, points)
        interviewer.stage = silent

        def look(kind: str, radius: float, seed: int, cosine: float | None, norm_ratio: float | None) -> Point:
            refusal = -_mean_loss(loaded, tokenizer, texts["refusals"], batch_size)
            loss = _mean_loss(loaded, tokenizer, texts["task"], batch_size)
            share = None
            if generate:
                found = interviewer.answers(HARMFUL_TASK, {"prompts": "harmful", **ask})
                share = Share.of([not is_refusal(answer.answer) for answer in found])
            return Point(kind, radius, seed, refusal, loss, share, cosine, norm_ratio)

        known = {(point.kind, point.radius, point.seed) for point in points}
        places = list(_places(radii, seeds))
        advance = stage("perturb and measure", len(places))
        for place in places:
            if place not in known:
                with _perturbed(weights, moved, *place, pair) as realised:
                    points.append(look(*place, *realised))
                if points[-1].kind == "aligned" and not points[-1].finite:
                    dtypes = ", ".join(settings["dtypes"])
                    raise AsftError(f"{model} gives no finite numbers in {dtypes}; give --dtype bfloat16 or float32")
                _keep(output / "landscape.json", settings, texts, points)
            advance()
        return [point for point in points if (point.kind, point.radius, point.seed) in set(places)]


def _places(radii: tuple[float, ...], seeds: int) -> Iterator[tuple[str, float, int]]:
    yield "aligned", 0.0, 0
    for kind in KINDS:
        for radius in radii:
            for seed in range(seeds if kind in ("inside", "orthogonal") else 1):
                yield kind, radius, seed


class _perturbed:
    """W + radius ||d|| E in every layer, E of norm 1; the weights are put back afterwards, bit by bit.

    Gives cosine and ratio of norms, over all layers, of the steps as the weights' dtype rounds them with those that
    were wanted: <r, w> / (||r|| ||w||) and ||r|| / ||w||; None where no step is wanted, or it overflowed.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        direction: AlignmentDirection,
        kind: str,
        radius: float,
        seed: int,
        pair: CheckpointPair | None = None,
    ):
        self.weights, self.direction, self.pair = weights, direction, pair
        self.kind, self.radius, self.seed = kind, radius, seed
        self.original: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> tuple[float | None, float | None]:
        inner = realised = wanted = 0.0
        for i, (name, weight) in enumerate(self.weights.items() if self.radius else ()):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + i)
            original = weight.detach().to("cpu", copy=True)
            d = None
            if self.pair is not None and self.kind in ("along", "against"):  # the others have no use for it
                base = self.pair.checkpoints["base"].weight(self.pair.stored_names["base"][name])
                d = original.float() - base.float()
            step = self.radius * perturbation(self.direction.modules[name], self.kind, generator, d)
            moved = (original.float() + step).to(original.dtype)
            self.original[name] = original
            weight.copy_(moved)
            rounded = moved.float() - original.float()
            inner += float((rounded * step).sum())
            realised += float(rounded.square().sum())
            wanted += float(step.square().sum())
        if not wanted or not math.isfinite(realised):  # no step, or one that overflowed
            return None, None
        cosine = inner / math.sqrt(realised * wanted) if realised else 0.0
        return round(cosine, 6), round(math.sqrt(realised / wanted), 6)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, original in self.original.items():
            self.weights[name].copy_(original)


def _moved(direction: AlignmentDirection, base: str | Path | None) -> AlignmentDirection:
    """The direction of the layers that are perturbed: those of which it keeps all directions have none orthogonal."""
    modules = {name: module for name, module in direction.modules.items() if module.rank < module.shape[0]}
    full = [name for name in direction.modules if name not in modules]
    if not modules:
        raise AsftError(
            f"the direction keeps all {direction.modules[full[0]].rank} directions of {full[0]}, and all of every "
            "other layer, so nothing is orthogonal to them; give a smaller --rank"
        )
    without = [name for name, module in modules.items() if module.V is None and module.rank]
    if without and base is None:
        raise AsftError(
            f"the direction file keeps no right singular vectors (first {without[0]}), so d is not known; make it "
            "with `axolotl asft extract --keep-v`, or give --base"
        )
    if full:
        text = "%d of %d layers are not perturbed: the direction keeps all of their directions (first %s)"
        LOG.warning(text, len(full), len(direction.modules), full[0])
    return replace(direction, modules=modules)


def _pair(base: str | Path, model: str, direction: AlignmentDirection) -> CheckpointPair:
    """Base and aligned checkpoint, paired as extraction does, by all of the direction's layers."""
    names = "|".join(re.escape(name) for name in direction.modules)
    return CheckpointPair(Checkpoint.open(base), Checkpoint.open(model), [f"^(?:{names})$"])


def _weights(model: Any, direction: AlignmentDirection) -> dict[str, Tensor]:
    """Layer name -> its weight (out, in), to be changed in place."""
    modules = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    for name, module in direction.modules.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise AsftError(f"the model has no layer {name} with a weight; use the direction of this model")
        if modules[name].__class__.__name__ == "Conv1D":  # GPT-2 keeps its weights as (in, out)
            weight = weight.T
        if tuple(weight.shape) != module.shape or not weight.is_floating_point():
            raise AsftError(
                f"{name} is {tuple(weight.shape)} of {weight.dtype}; the direction expects {module.shape} in floating "
                "point; use its own model, not quantised"
            )
        other = places.setdefault(weight.data_ptr(), name)
        if other != name:
            raise AsftError(
                f"{other} and {name} share one weight, which would be perturbed twice; make a direction of one of them "
                "with `axolotl asft extract --modules`"
            )
        weights[name] = weight
    return weights


def _mean_loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch_size: int) -> float:
    found = log_likelihoods(model, tokenizer, pairs, batch_size)
    return -sum(total for total, _ in found) / max(1, sum(count for _, count in found))


def _kept(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Pairs] | None, list[Point]]:
    """The texts that were measured on, which a template with the date in it would not give again, and the points."""
    if not path.is_file():
        return None, []
    content = read_json(path, "give another --output, or delete it")
    try:
        kept = dict(content["settings"])
        texts = {name: [(asked, answer) for asked, answer in content["texts"][name]] for name in ("refusals", "task")}
        points = [_point(point) for point in content["points"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AsftError(f"{path} holds no landscape ({error}); give another --output, or delete it") from error
    if kept != settings:
        differing = next((key for key in settings if kept.get(key) != settings[key]), "settings")
        raise AsftError(
            f"{path} holds a landscape with other settings ({differing}); give another --output, or delete it"
        )
    return texts, points


def _keep(path: Path, settings: dict[str, Any], texts: dict[str, Pairs], points: list[Point]) -> None:
    content = {"settings": settings, "texts": texts, "points": [without_nan(asdict(point)) for point in points]}
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _point(kept: dict[str, Any]) -> Point:
    """What JSON had to write as null are numbers that were not finite."""
    lost = [key for key in ("refusal", "task_loss") if key in kept and kept[key] is None]
    share = kept.get("harmfulness")
    return Point(**kept | dict.fromkeys(lost, math.nan) | {"harmfulness": share and Share(**share)})
