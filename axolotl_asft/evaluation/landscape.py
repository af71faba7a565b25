"""The narrow safety basin: what happens to refusals around the aligned weights, along the direction and off it."""

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_asft import __version__
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.direction import AlignmentDirection, ModuleDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import HARMFUL_TASK, Interviewer
from axolotl_asft.evaluation.coherence import log_likelihoods
from axolotl_asft.evaluation.models import load_model, load_tokenizer
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.files import atomic_write_text

KINDS = ("along", "against", "inside", "orthogonal")
KIND_WORDS = {
    "along": "+d: further the way that alignment went",
    "against": "-d: back towards the base model (radius 1)",
    "inside": "random, inside the aligned subspace",
    "orthogonal": "random, orthogonal to it",
}
RADII = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One place around the aligned weights.

    Attributes:
        kind: one of `KINDS`, or "aligned" at radius 0.
        radius: in units of each layer's ||d||_F.
        seed: of the random direction.
        refusal: mean log-probability of a token of the aligned model's own refusals, in nats.
        task_loss: mean negative log-probability of a token of the task's answers, in nats.
        harmfulness: share of harmful prompts not refused; None where only the proxy was measured.
    """

    kind: str
    radius: float
    seed: int
    refusal: float
    task_loss: float
    harmfulness: float | None = None


def perturbation(module: ModuleDirection, kind: str, generator: torch.Generator) -> Tensor:
    """A matrix (out, in) of norm ||d||_F: +-d, or random inside or outside the span of U's columns.

    Args:
        module: with V, so that d ~ U diag(S) V^T is known; it is scaled to the norm of all of d.
        kind: one of `KINDS`.
        generator: of the Gaussian matrices.
    """
    U = module.U.float()
    if kind in ("along", "against"):
        assert module.V is not None
        matrix = (U * module.S.float()) @ module.V.float().T
        matrix = -matrix if kind == "against" else matrix
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

    Written to `output`: landscape.json after every point, so that an interrupted measurement goes on.

    Args:
        model: the aligned model, folder or Hub id, in its own precision.
        direction: of that model, with V.
        output: a folder.
        radii: in units of ||d||_F of each layer, all layers at once.
        seeds: random directions of each kind.
        task: (prompt, answer) whose loss tells usefulness; default: the model's own answers to harmless prompts.
        generate: also ask every prompt, and count refusals.
        limit: prompts of each set.

    Raises:
        AsftError: a direction without V, of another model, or a model that refuses nothing.
    """
    quieten_libraries()
    output = Path(output)
    without = [name for name, module in direction.modules.items() if module.V is None and module.rank]
    if without:
        raise AsftError(
            f"the direction file keeps no right singular vectors (first {without[0]}), so that d is not known; make it "
            "with `axolotl asft extract --keep-v`, or give --base"
        )
    loaded, tokenizer = load_model(model, dtype, device=device), load_tokenizer(model)
    weights = _weights(loaded, direction)
    interviewer = Interviewer(loaded, tokenizer, batch_size, max_new_tokens)
    ask = {"split": "heldout", "limit": limit}
    advance = stage("ask the aligned model", 2)
    answers = interviewer.answers(HARMFUL_TASK, {"prompts": "harmful", **ask})
    refusals = [(answer.asked, answer.answer) for answer in answers if is_refusal(answer.answer)]
    advance()
    if not refusals:
        raise AsftError(f"{model} refuses none of {len(answers)} harmful prompts; there is no basin to draw")
    pairs = _asked(tokenizer, task) if task is not None else _own_answers(interviewer, ask)
    advance()

    def look(kind: str, radius: float, seed: int) -> Point:
        refusal = -_mean_loss(loaded, tokenizer, refusals, batch_size)
        loss = _mean_loss(loaded, tokenizer, pairs, batch_size)
        share = None
        if generate:
            found = interviewer.answers(HARMFUL_TASK, {"prompts": "harmful", **ask})
            share = sum(not is_refusal(answer.answer) for answer in found) / len(found)
        return Point(kind, radius, seed, refusal, loss, share)

    settings = {
        "model": model,
        "direction_sha256": direction.sha256,
        "prompts": [answer.prompt for answer in answers],
        "task": len(pairs),
        "generate": generate,
        "version": __version__,
    }
    points = _kept(output / "landscape.json", settings)
    known = {(point.kind, point.radius, point.seed) for point in points}
    places = list(_places(radii, seeds))
    advance = stage("perturb and measure", len(places))
    for place in places:
        if place not in known:
            with _perturbed(weights, direction, *place):
                points.append(look(*place))
            _keep(output / "landscape.json", settings, points)
        advance()
    return [point for point in points if (point.kind, point.radius, point.seed) in set(places)]


@dataclass(frozen=True)
class Verdict:
    """Whether this model bears out the claim that the method rests on.

    Attributes:
        holds: at every radius, orthogonal perturbations cost more refusal than those along the direction do, by more
            than two standard errors of the random directions.
        inside_matters: the same for the random directions inside the aligned subspace, against the orthogonal ones.
        text: one sentence of each, with the numbers at radius 1 or the nearest to it.
    """

    holds: bool
    inside_matters: bool
    text: str


def verdict(points: list[Point]) -> Verdict:
    """Compare the loss of refusal by kind of perturbation.

    Raises:
        AsftError: too few points: no aligned model among them, or one seed alone.
    """
    aligned = next((point.refusal for point in points if point.kind == "aligned"), None)
    radii = sorted({point.radius for point in points if point.kind == "orthogonal"})
    if aligned is None or not radii:
        raise AsftError("the landscape has no aligned model or no orthogonal perturbation; measure at least one radius")
    nearest = min(radii, key=lambda radius: abs(math.log(radius)))
    kinds = {kind: {radius: _drop(points, kind, radius, aligned) for radius in radii} for kind in KINDS}
    holds = all(_more(kinds["orthogonal"][radius], kinds["along"][radius]) for radius in radii)
    inside = all(_more(kinds["orthogonal"][radius], kinds["inside"][radius]) for radius in radii)
    drops = ", ".join(f"{kind} {kinds[kind][nearest][0]:+.3f}" for kind in KINDS)
    words = {True: "bears out", False: "does not bear out"}
    text = (
        f"This model {words[holds]} that steps orthogonal to the alignment direction cost more safety than steps along "
        f"it. It {words[inside]} that they cost more than random steps inside the aligned subspace. Loss of "
        f"log-probability per token of its refusals at radius {nearest:g}: {drops} nats."
    )
    return Verdict(holds, inside, text)


def landscape_table(points: list[Point]) -> str:
    """Mean over seeds of every kind and radius, as Markdown."""
    generated = any(point.harmfulness is not None for point in points)
    lines = [
        f"| step | radius | log p of refusals | task loss |{' harmfulness |' if generated else ''}",
        f"| --- | ---: | ---: | ---: |{' ---: |' if generated else ''}",
    ]
    for kind, radius in dict.fromkeys((point.kind, point.radius) for point in points):
        group = [point for point in points if (point.kind, point.radius) == (kind, radius)]
        refusal, spread = _mean([p.refusal for p in group]), _spread([p.refusal for p in group])
        cells = f"| {kind} | {radius:g} | {refusal:.3f}{f' ± {spread:.3f}' if len(group) > 1 else ''} "
        cells += f"| {_mean([p.task_loss for p in group]):.3f} |"
        if generated:
            cells += f" {_mean([p.harmfulness or 0.0 for p in group]):.1%} |"
        lines.append(cells)
    return "\n".join(lines)


def _places(radii: tuple[float, ...], seeds: int) -> Iterator[tuple[str, float, int]]:
    yield "aligned", 0.0, 0
    for kind in KINDS:
        for radius in radii:
            for seed in range(seeds if kind in ("inside", "orthogonal") else 1):
                yield kind, radius, seed


class _perturbed:
    """W + radius ||d|| E in every layer, E of norm 1; the weights are put back afterwards."""

    def __init__(self, weights: dict[str, Tensor], direction: AlignmentDirection, kind: str, radius: float, seed: int):
        self.weights, self.direction, self.kind, self.radius, self.seed = weights, direction, kind, radius, seed
        self.original: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        if self.radius == 0:
            return
        for i, (name, weight) in enumerate(self.weights.items()):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + i)
            step = self.radius * perturbation(self.direction.modules[name], self.kind, generator)
            self.original[name] = weight.detach().to("cpu", copy=True)
            weight.copy_(weight.float() + step.to(weight.device))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, original in self.original.items():
            self.weights[name].copy_(original)


def _weights(model: Any, direction: AlignmentDirection) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    missing = [name for name in direction.modules if name not in modules]
    if missing:
        raise AsftError(f"the model has no layer {missing[0]}; use the direction of this model")
    weights = {name: modules[name].weight for name in direction.modules}
    for name, weight in weights.items():
        if tuple(weight.shape) != direction.modules[name].shape or not weight.is_floating_point():
            raise AsftError(
                f"{name} is {tuple(weight.shape)} of {weight.dtype}; the direction wants "
                f"{direction.modules[name].shape} in floating point; use its own model, not quantised"
            )
    return weights


def _asked(tokenizer: Any, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    def chat(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return [(chat(prompt), answer) for prompt, answer in turns]


def _own_answers(interviewer: Interviewer, ask: dict[str, Any]) -> list[tuple[str, str]]:
    answers = interviewer.answers("asft_over_refusal", {"borderline": "borderline", **ask})
    kept = [(answer.asked, answer.answer) for answer in answers if not is_refusal(answer.answer)]
    return kept or [(answer.asked, answer.answer) for answer in answers]


def _mean_loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch_size: int) -> float:
    found = log_likelihoods(model, tokenizer, pairs, batch_size)
    return -sum(total for total, _ in found) / max(1, sum(count for _, count in found))


def _drop(points: list[Point], kind: str, radius: float, aligned: float) -> tuple[float, float]:
    drops = [aligned - point.refusal for point in points if (point.kind, point.radius) == (kind, radius)]
    return _mean(drops), _spread(drops)


def _more(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] - other[0] > 2 * math.hypot(one[1], other[1])


_mean: Callable[[list[float]], float] = statistics.fmean


def _spread(values: list[float]) -> float:
    """The standard error of the mean; 0 of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _kept(path: Path, settings: dict[str, Any]) -> list[Point]:
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("settings") != settings:
        raise AsftError(f"{path} holds a landscape of other settings; give another --output, or delete it")
    return [Point(**point) for point in content["points"]]


def _keep(path: Path, settings: dict[str, Any], points: list[Point]) -> None:
    content = {"settings": settings, "points": [asdict(point) for point in points]}
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")
