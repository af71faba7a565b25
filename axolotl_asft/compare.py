"""Two direction files held against each other: do they point the same way?"""

from typing import Any

import torch
from torch import Tensor

from axolotl_asft import fingerprint
from axolotl_asft.direction import AlignmentDirection, ModuleDirection
from axolotl_asft.errors import AsftError


def compare(first: AlignmentDirection, second: AlignmentDirection) -> dict[str, Any]:
    """Everything that `axolotl asft diff --json` prints.

    Of a module, with U and U' the stored directions, k the smaller of their numbers and cos the cosines of the
    principal angles between their spans (the singular values of U^T U'):

        overlap = ||U^T U'||_F^2 / k = mean cos^2,    0 of orthogonal spans, 1 where one lies in the other

    Two random spans of k directions among `out` have k / out. The cosine is that of s^2-weighted spans, tr(C C') over
    ||C|| ||C'|| with C = U diag(s^2) U^T: 1 where `paper` projectors agree up to scale.

    `reverse` says whether each file's base is the other's aligned model, by the sha256 of their weights.
    `same_aligned_weights` is of the shared layers, by their fingerprints; None where a file has none of them.

    Raises:
        AsftError: no module of one name and number of outputs in both.
    """
    shared = [
        name
        for name in first.modules
        if name in second.modules and len(first.modules[name].U) == len(second.modules[name].U)
    ]
    if not shared:
        raise AsftError(
            f"the files share no layer (the first's is {next(iter(first.modules))}, the second's "
            f"{next(iter(second.modules))}); give two directions of one architecture"
        )
    modules = [{"name": name, **_module(first.modules[name], second.modules[name])} for name in shared]
    weights = [module["norm"][0] ** 2 for module in modules]
    return {
        "files": [_origin(first), _origin(second)],
        "same": first.sha256 is not None and first.sha256 == second.sha256,
        "reverse": None not in _hashes(first) and _hashes(first) == _hashes(second)[::-1],
        "same_aligned_weights": _same_weights(_blocks(first), _blocks(second), shared),
        "shared": len(shared),
        "only_in_first": [name for name in first.modules if name not in shared],
        "only_in_second": [name for name in second.modules if name not in shared],
        "cosine": _mean([module["cosine"] for module in modules], weights),
        "overlap": _mean([module["overlap"] for module in modules], weights),
        "modules": modules,
    }


def _mean(values: list[float], weights: list[float]) -> float:
    """Weighted; no rounding takes it past the largest of them."""
    total = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return min(total / (sum(weights) or 1.0), max(values))


def _module(first: ModuleDirection, second: ModuleDirection) -> dict[str, Any]:
    k = min(first.rank, second.rank)
    # as they are stored, rounded, they are not quite orthonormal: a file and itself would be more than the same
    U, V = _orthonormal(first.U), _orthonormal(second.U)
    product = U.T @ V
    cosines = torch.linalg.svdvals(product).clamp(max=1)[:k] if k else product.new_zeros(0)
    a, b = first.S.double() ** 2, second.S.double() ** 2
    size = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return {
        "k": [first.rank, second.rank],
        "overlap": float(cosines.square().mean()) if k else 0.0,
        "by_chance": max(first.rank, second.rank) / len(first.U),
        "largest_angle": float(torch.rad2deg(torch.acos(cosines[-1]))) if k else 90.0,
        "cosine": min(1.0, float(a @ product.square() @ b) / size) if size else 0.0,
        "norm": [float(first.norm), float(second.norm)],
    }


def _orthonormal(U: Tensor) -> Tensor:
    """Columns with the span and the order of U's, in fp64."""
    return torch.linalg.qr(U.double())[0]


def _origin(direction: AlignmentDirection) -> dict[str, Any]:
    return {
        "aligned": direction.spec["aligned"]["id"],
        "base": direction.spec["base"]["id"],
        "sha256": direction.sha256,
        "modules": len(direction.modules),
    }


def _hashes(direction: AlignmentDirection) -> list[str | None]:
    return [direction.spec[side].get("sha256") for side in ("base", "aligned")]


def _blocks(direction: AlignmentDirection) -> dict[str, str]:
    """Module -> the kept block of the aligned model's weight; {} where there are none that can be read here."""
    kept = direction.spec["aligned"].get("fingerprint")
    blocks = kept.get("blocks") if isinstance(kept, dict) and kept.get("scheme") == fingerprint.SCHEME else None
    return blocks if isinstance(blocks, dict) else {}


def _same_weights(first: dict[str, str], second: dict[str, str], shared: list[str]) -> bool | None:
    """Whether both are of one model, as `axolotl_asft.verify` tells it; a copy in another dtype is the same."""
    differing = compared = 0
    for name in shared:
        if name in first and name in second:
            one, other = fingerprint.decode_block(first[name]), fingerprint.decode_block(second[name])
            differing += min(fingerprint.mismatching_values(*pair) for pair in ((one, other), (other, one)))
            compared += len(one)
    return differing <= fingerprint.MAX_MISMATCH * compared if compared else None


def comparison_text(result: dict[str, Any], modules: bool) -> str:
    """What `axolotl asft diff` prints."""
    first, second = (
        f"{file['aligned']} - {file['base']} (sha256 {str(file['sha256'])[:12]})" for file in result["files"]
    )
    weights = {True: "the same weights", False: "other weights", None: "not known: a file has no fingerprint of them"}
    chance = sum(module["by_chance"] for module in result["modules"]) / result["shared"]
    lines = [
        f"first    {first}",
        f"second   {second}",
        f"aligned  {weights[result['same_aligned_weights']]}",
        f"layers   {result['shared']} shared, {len(result['only_in_first'])} in the first alone, "
        f"{len(result['only_in_second'])} in the second alone",
        f"overlap  {result['overlap']:.3f} of the spans (by chance {chance:.3f})",
        f"cosine   {result['cosine']:.3f} of the spans weighted by s^2",
    ]
    if result["same"]:
        lines.append("The files are the same, byte by byte.")
    if result["reverse"]:
        lines.append("One is the reverse of the other: in one of them --base and --aligned were swapped.")
    if modules:
        width = max(len(module["name"]) for module in result["modules"])
        lines += ["", f"{'module':<{width}}  {'overlap':>7}  {'angle':>6}  {'cosine':>6}  {'||d||':>9}  {'||d||':>9}"]
        lines += [
            f"{m['name']:<{width}}  {m['overlap']:>7.3f}  {m['largest_angle']:>6.1f}  {m['cosine']:>6.3f}  "
            f"{m['norm'][0]:>9.4g}  {m['norm'][1]:>9.4g}"
            for m in result["modules"]
        ]
    return "\n".join(lines)
