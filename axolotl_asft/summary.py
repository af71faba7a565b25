"""What a direction file holds, as plain data and as text."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.penalty import projector_eigenvalues
from axolotl_asft.spec import own_answers_in
from axolotl_asft.strengths import strengths


def summary(direction: AlignmentDirection, path: Path) -> dict[str, Any]:
    """Everything that `axolotl asft inspect --json` prints."""
    spec, turns = direction.spec, own_answers_in(direction.spec)
    modules = [_module_summary(direction, name) for name in direction.modules]
    captured = sum(m["energy"] * m["norm"] ** 2 for m in modules)
    total = sum(m["norm"] ** 2 for m in modules)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": direction.sha256,
        "base": {key: value for key, value in spec["base"].items() if key != "fingerprint"},
        "aligned": {key: value for key, value in spec["aligned"].items() if key != "fingerprint"},
        "relative_norm": spec.get("relative_norm"),
        "norm": math.sqrt(total),
        "energy": captured / total if total else 1.0,
        "max_bound": max(m["bound"] for m in modules),
        "max_c": {
            "paper": max(m["max_c_paper"] for m in modules),
            "over_2": sum(m["max_c_paper"] > 2 for m in modules),
        },
        "metrics": {
            name: {**entry, "layers": _layers_with(direction, name)} for name, entry in spec.get("metrics", {}).items()
        },
        "own_answers": turns,
        "own_answers_different": len(set(turns)),
        "own_answers_declining": declining(turns),
        "rank": spec["rank"],
        "svd": spec["svd"],
        "tool": spec["tool"],
        "created": spec["created"],
        "modules": modules,
    }


def declining(turns: Iterable[tuple[str, str]]) -> int:
    """How many of the answers decline."""
    return sum(is_refusal(answer) for _, answer in turns)


def recommended(spec: Mapping[str, Any]) -> str:
    """The lines of an `asft:` block that the benchmark speaks for with such a file, where it holds what they need."""
    metrics = spec.get("metrics", {})
    if "fisher" not in metrics:
        return "  metric: activations\n" if "activations" in metrics else ""
    chosen = strengths("fisher", spec, taken_out=False)
    if not chosen.anchor_weight:
        return ""
    return f"  metric: fisher\n  lambda_reg: {chosen.lambda_reg:g}\n  anchor_weight: {chosen.anchor_weight:g}\n"


def _layers_with(direction: AlignmentDirection, metric: str) -> int:
    """In how many layers a metric is not empty."""
    return sum(metric in module.metrics and module.metrics[metric].sees() for module in direction.modules.values())


def _module_summary(direction: AlignmentDirection, name: str) -> dict[str, Any]:
    module = direction.modules[name]
    entry = direction.spec["modules"][name]
    c = projector_eigenvalues("paper", module.S, module.norm)
    return {
        "name": name,
        "shape": list(module.shape),
        "k": module.rank,
        "dtype": str(module.U.dtype).removeprefix("torch."),
        "has_v": module.V is not None,
        "norm": float(module.norm),
        "s_1": float(module.S[0]) if module.rank else 0.0,
        "s_k": float(module.S[-1]) if module.rank else 0.0,
        "energy": entry["energy"],
        "bound": entry["bound"],
        "max_c_paper": float(c.max()) if module.rank else 0.0,
    }


def summary_table(result: dict[str, Any]) -> str:
    """The first lines of `axolotl asft inspect`."""
    relative, layers = result["relative_norm"], len(result["modules"])
    lines = [
        ("file", f"{result['file']}, {size_text(result['bytes'])}"),
        ("sha256", result["sha256"]),
        ("base", model_text(result["base"])),
        ("aligned", model_text(result["aligned"])),
        ("modules", ranks_text(result)),
        ("difference", f"||d|| = {result['norm']:.4g}" + (f", {relative:.2%} of ||W||" if relative else "")),
        ("energy", f"{result['energy']:.1%} of ||d||^2 in the stored directions"),
        ("error bound", f"at most {result['max_bound']:.3g} of ||dW||^2 (paper penalty, worst layer)"),
        ("metrics", ", ".join(["weights", *(_metric(name, of, layers) for name, of in result["metrics"].items())])),
        ("own answers", _answers(result)),
        ("paper max c", f"{result['max_c']['paper']:.4g}" + _over_two(result["max_c"]["over_2"])),
        ("made by", f"{result['tool']}, {result['created']}"),
    ]
    return "\n".join(f"{label:<12}  {text}" for label, text in lines)


def module_table(result: dict[str, Any]) -> str:
    """One line a module: shape, rank, norm, energy, bound."""
    width = max(len(module["name"]) for module in result["modules"])
    lines = [f"{'module':<{width}}  {'out x in':>13}  {'k':>5}  {'||d||':>9}  {'s_1':>9}  {'energy':>7}  {'bound':>8}"]
    for m in result["modules"]:
        shape = f"{m['shape'][0]} x {m['shape'][1]}"
        lines.append(
            f"{m['name']:<{width}}  {shape:>13}  {m['k']:>5}  {m['norm']:>9.4g}  {m['s_1']:>9.4g}  "
            f"{m['energy']:>7.1%}  {m['bound']:>8.2g}"
        )
    return "\n".join(lines)


def ranks_text(result: dict[str, Any]) -> str:
    """How many modules, and how many directions each."""
    ranks = sorted({module["k"] for module in result["modules"]})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{len(result['modules'])}, {rank} direction{'s' * (ranks != [1])} each"


def model_text(entry: dict[str, Any]) -> str:
    """A model of a direction file: its name, revision and hash, and how it was read."""
    revision = f"@{entry['revision']}" if entry.get("revision") else ""
    weights = f"weights sha256 {entry['sha256'][:12]}, " if entry.get("sha256") else ""
    return f"{entry['id']}{revision}  ({weights}{entry.get('read_as')})"


def _metric(name: str, of: dict[str, Any], layers: int) -> str:
    return f"{name} in {of['layers']} of {layers} layers (from {of.get('answers')} answers)"


def _answers(result: dict[str, Any]) -> str:
    count, different = len(result["own_answers"]), result["own_answers_different"]
    if not count:
        return "none"
    again = f" ({different} different)" if different < count else ""  # where there are few of a kind, they come again
    return f"{count}{again}, of which {result['own_answers_declining']} decline; for anchor_weight"


def _over_two(layers: int) -> str:
    return f"  (past 2 in {layers} layers: there an aligned update costs more than an orthogonal one)" if layers else ""


def size_text(count: int) -> str:
    """A number of bytes."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
