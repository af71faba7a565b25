"""Safe LoRA: project an adapter that was trained without the constraint, after the fact."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from axolotl_asft import __version__
from axolotl_asft.adapter_folder import check_output, write_projected
from axolotl_asft.direction import ON_UNCOVERED, AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.files import without_nan, writable_folder
from axolotl_asft.penalty import PROJECTORS, orthogonal_part, squared_norm
from axolotl_asft.saved import SavedAdapter, SavedLayer
from axolotl_asft.verify import verify_checkpoint

LOG = logging.getLogger("axolotl.asft")

WHOLE = 0.99  # of ||d||^2: where the directions that are kept hold so much, C is nearly the published one


@dataclass(frozen=True)
class ProjectedLayer:
    """What became of one layer.

    Attributes:
        cosine: of C dW and dW; NaN where dW or C dW is zero.
        projected: whether it was chosen.
        norm_before, norm_after: ||dW||_F.
    """

    name: str
    cosine: float
    projected: bool
    norm_before: float
    norm_after: float


@dataclass(frozen=True)
class ProjectionReport:
    """What became of the adapter.

    Attributes:
        layers: one entry a layer.
        settings: how it was projected, as written into adapter_config.json.
        uncovered: names of what was left as it is: layers without a direction, tensors that are no A or B.
    """

    layers: tuple[ProjectedLayer, ...]
    settings: dict[str, Any]
    uncovered: tuple[str, ...] = ()

    @property
    def projected(self) -> int:
        """Number of layers that were projected."""
        return sum(layer.projected for layer in self.layers)

    @property
    def norm_before(self) -> float:
        """||dW||_F over all layers."""
        return math.sqrt(sum(layer.norm_before**2 for layer in self.layers))

    @property
    def norm_after(self) -> float:
        """||dW||_F over all layers, afterwards."""
        return math.sqrt(sum(layer.norm_after**2 for layer in self.layers))


def projection_cosine(A: Tensor, B: Tensor, U: Tensor, c: Tensor) -> float:
    """cos(C B A, B A) = <C B A, B A>_F / (||C B A||_F ||B A||_F), in O((out (k + r) + in r) r).

    Args:
        A: (r, in). B: (out, r).
        U: (out, k), orthonormal columns; c: (k,), eigenvalues of C = U diag(c) U^T.

    Returns:
        0 to 1 for c >= 0; NaN where B A or C B A is zero, which have no angle.
    """
    projected = U @ (c[:, None] * (U.T @ B))
    inner = ((projected.T @ B) * (A @ A.T)).sum()
    norms = squared_norm(projected, A).clamp(min=0).sqrt(), squared_norm(B, A).clamp(min=0).sqrt()
    return float(inner / norms[0] / norms[1]) if all(norm > 0 for norm in norms) else math.nan


def attenuated(B: Tensor, U: Tensor, c: Tensor, attenuate: float = 1.0) -> Tensor:
    """B - f (I - C) B: f = 1 is Safe LoRA's C B, f = 0 leaves B as it is.

    Args:
        B: (out, r). U: (out, k). c: (k,).
        attenuate: f, how much of the orthogonal part is taken away, 0 to 1.
    """
    return B - attenuate * orthogonal_part(B, U, c)


def project_adapter(
    adapter: str | Path,
    direction: AlignmentDirection,
    output: str | Path,
    threshold: float | None = None,
    layers: int | None = None,
    attenuate: float | None = None,
    projector: str = "paper",
    rank: int | None = None,
    on_uncovered: str = "error",
    verify_model: bool = True,
    force: bool = False,
) -> ProjectionReport:
    """B <- C B in the chosen layers of a saved LoRA adapter: Safe LoRA (Hsu et al. 2024, arXiv 2405.16833).

    A layer is chosen where cos(C dW, dW) is at most `threshold`, or where it is among the `layers` smallest (of
    equal ones, the first by name). Each chosen layer is projected once; the authors' code rounds the cosine to five
    digits, and projects twice when it chooses by number. With `attenuate` alone, every layer is chosen.

    Args:
        adapter: folder of a PEFT LoRA adapter; it is left as it is.
        direction: of the model that it belongs to; compared with it where its checkpoint lies in a local folder.
        output: folder to write; a complete adapter. Neither inside the adapter's folder nor around it.
        threshold: -1 to 1.
        layers: how many layers to project.
        attenuate: f in B - f (I - C) B; default 1.
        projector, rank: C, as for `AlignmentPenalty`; Safe LoRA's is "paper".
        on_uncovered: "error", "warn" or "ignore" where the adapter holds a layer without a direction, or a tensor that
            is no A or B; the latter two leave it as it is.
        verify_model: compare the direction with the adapter's base model, where that is a local folder.
        force: replace `output`, where it holds an adapter and nothing else.

    Raises:
        AsftError: no such adapter or output, settings out of range, a direction of another model, or something
            uncovered under on_uncovered="error".
    """
    _check(threshold, layers, attenuate, projector, rank, on_uncovered)
    output = Path(output)
    check_output(output, Path(adapter), force)
    saved = SavedAdapter.read(adapter)
    linear = list(saved.layers())
    if not linear:
        raise AsftError(
            f"{saved.folder} holds no LoRA of a linear layer, so there is nothing to project; give an adapter of "
            "linear layers"
        )
    found = [layer for layer in linear if layer.A.any() and layer.B.any()]  # PEFT saves frozen ones as well
    if not found:
        raise AsftError(f"{saved.folder}: B A is 0 in every layer, so there is nothing to project; train it first")
    writable_folder(output.parent)
    covered = _covered(found, direction)
    uncovered = _uncovered(found, saved.others(), direction, on_uncovered)
    if layers is not None and layers > len(covered):
        raise AsftError(f"--layers is {layers}; the adapter has {len(covered)} layers with a direction")
    base_model = str(saved.config.get("base_model_name_or_path"))
    verified = verify_model and verify_checkpoint(direction, base_model)
    parts = {layer.name: _factors(layer, direction, projector, rank) for layer in covered}
    cosines = {layer.name: projection_cosine(*parts[layer.name]) for layer in covered}
    chosen = _choose(cosines, threshold, layers)
    tensors, rows = dict(saved.tensors), []
    for layer in found:
        before = after = layer.scaling * math.sqrt(float(squared_norm(layer.B.float(), layer.A.float())))
        if layer.name in chosen:
            A, B, U, c = parts[layer.name]
            new = attenuated(B, U, c, 1.0 if attenuate is None else attenuate).to(layer.B.dtype)
            tensors[layer.key_B] = new.contiguous()
            after = layer.scaling * math.sqrt(float(squared_norm(new.float(), A)))
        rows.append(ProjectedLayer(layer.name, cosines.get(layer.name, math.nan), layer.name in chosen, before, after))
    settings = {
        "method": "Safe LoRA (arXiv 2405.16833)",
        "threshold": threshold,
        "layers": layers,
        "attenuate": 1.0 if attenuate is None else attenuate,
        "projector": projector,
        "rank": rank,
        "energy": round(statistics.median(_energy(direction, layer.name, rank) for layer in covered), 4),
        "direction_sha256": direction.sha256,
        "projected": len(chosen),
        "uncovered": len(uncovered),
        "verify_model": verify_model,
        "verified": verified,
        "version": __version__,
    }
    report = ProjectionReport(tuple(rows), settings, tuple(uncovered))
    write_projected(saved, tensors, output, settings, _section(report), force)
    return report


def summary_text(report: ProjectionReport) -> str:
    """A few lines: how many layers, what was left or not looked at, the range of cosines, the norm before and after."""
    cosines = sorted(layer.cosine for layer in report.layers if not math.isnan(layer.cosine))
    spread = ""
    if cosines:
        spread = f"cos(C dW, dW): {cosines[0]:.4f} to {cosines[-1]:.4f}, median {cosines[len(cosines) // 2]:.4f}\n"
    left = ""
    if not report.projected:
        at_most = report.settings["threshold"]
        left = f"nothing was projected, the output is a copy: no layer's cosine is at most --threshold {at_most:g}\n"
    if report.settings["projector"] == "paper" and report.settings["energy"] < WHOLE:
        left += (
            f"C is built from the stored directions, {report.settings['energy']:.0%} of ||d||^2 in the median layer; "
            "the published method uses all: with a larger `extract --rank` cosines are higher, and less is removed\n"
        )
    if report.uncovered:
        left += f"not covered, left as they are: {len(report.uncovered)} ({_first(report.uncovered)})\n"
    if not report.settings["verified"]:
        why = " (they have to be in a local folder)" if report.settings["verify_model"] else ""
        left += f"the direction was not compared with the base model's weights{why}\n"
    return (
        f"projected {report.projected} of {len(report.layers)} layers\n{left}{spread}"
        f"||dW||: {report.norm_before:.4g} before, {report.norm_after:.4g} after"
    )


def _check(threshold, layers, attenuate, projector: str, rank: int | None, on_uncovered: str) -> None:
    if threshold is not None and layers is not None:
        raise AsftError("both --threshold and --layers are given; choose the layers by one of them")
    if threshold is None and layers is None and attenuate is None:
        raise AsftError(
            "nothing says which layers to project; give --threshold (a cosine), --layers, or --attenuate "
            "for all of them"
        )
    if threshold is not None and not -1 <= threshold <= 1:
        raise AsftError(f"--threshold is {threshold}; expected a cosine, -1 to 1")
    if layers is not None and layers < 1:
        raise AsftError(f"--layers is {layers}; expected 1 or more")
    if attenuate is not None and not 0 <= attenuate <= 1:
        raise AsftError(f"--attenuate is {attenuate}; expected 0 (leave) to 1 (project)")
    if projector not in PROJECTORS:
        raise AsftError(f"--projector is {projector!r}; expected one of {', '.join(PROJECTORS)}")
    if rank is not None and rank < 1:
        raise AsftError(f"--rank is {rank}; expected 1 or more; a rank of 0 would erase the adapter")
    if on_uncovered not in ON_UNCOVERED:
        raise AsftError(f"--on-uncovered is {on_uncovered!r}; expected one of {', '.join(ON_UNCOVERED)}")


def _uncovered(
    found: list[SavedLayer], others: list[str], direction: AlignmentDirection, on_uncovered: str
) -> list[str]:
    """Names of the layers without a direction and of the tensors that are no factor, unless they are refused."""
    layers = [layer.name for layer in found if layer.name not in direction.modules]
    what = [f"{len(layers)} of {len(found)} layers have no direction ({_first(layers)})"] if layers else []
    if others:
        what.append(f"{len(others)} tensors are neither A nor B ({_first(others)})")
    text = " and ".join(what)
    if layers and len(layers) == len(found):
        raise AsftError(f"{text}; use the direction of the adapter's model")
    if what and on_uncovered == "error":
        raise AsftError(
            f"{text}, so they cannot be projected; use the direction of all the adapter's layers, or "
            "--on-uncovered ignore to leave them as they are"
        )
    if what and on_uncovered == "warn":
        LOG.warning(f"{text}; they are left as they are")
    return [*layers, *others]


def _first(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _covered(found: list[SavedLayer], direction: AlignmentDirection) -> list[SavedLayer]:
    covered = [layer for layer in found if layer.name in direction.modules]
    for layer in covered:
        direction.modules[layer.name].check_shape(layer.name, (layer.B.shape[0], layer.A.shape[1]), "adapter")
    return covered


def _factors(layer: SavedLayer, direction: AlignmentDirection, projector: str, rank: int | None):
    """A, B, U and c, in fp32."""
    U, c = direction.modules[layer.name].projector(projector, rank)
    return layer.A.float(), layer.B.float(), U.float(), c


def _energy(direction: AlignmentDirection, name: str, rank: int | None) -> float:
    """||U^T d||^2 / ||d||^2, the part of the direction that C is made of; 1 where alignment moved nothing."""
    module = direction.modules[name]
    norm = float(module.norm)
    return min(1.0, float(module.S[:rank].double().square().sum()) / norm**2) if norm > 0 else 1.0


def _choose(cosines: dict[str, float], threshold: float | None, layers: int | None) -> set[str]:
    """A zero update has no cosine; it stays what it is. One orthogonal to all of C has cosine 0 by continuity."""
    order = sorted(cosines, key=lambda name: (0.0 if math.isnan(cosines[name]) else cosines[name], name))
    if layers is not None:
        return set(order[:layers])
    if threshold is not None:
        return {name for name in order if (0.0 if math.isnan(cosines[name]) else cosines[name]) <= threshold}
    return set(order)


def _section(report: ProjectionReport) -> str:
    settings = report.settings
    how = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None and key != "method")
    return (
        "## Projection after training\n\n"
        f"Projected towards the alignment direction of its base model by {settings['method']}, with "
        "[axolotl-asft](https://pypi.org/project/axolotl-asft/): "
        f"{how}. Update norm {report.norm_before:.4g} before, {report.norm_after:.4g} after.\n"
    )


def as_dict(report: ProjectionReport) -> dict[str, Any]:
    """The report as JSON values; a missing cosine is null."""
    return without_nan(asdict(report))
