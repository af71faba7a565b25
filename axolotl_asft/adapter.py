"""The penalty over the LoRA layers of a PEFT model, matched to directions by whole name."""

import logging
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from axolotl_asft.direction import AlignmentDirection, ModuleDirection, select_modules
from axolotl_asft.errors import AsftError
from axolotl_asft.lora import FoundLayer, other_trainable_parameters, trainable_lora_layers
from axolotl_asft.penalty import (
    PROJECTORS,
    lora_penalty,
    lora_penalty_gradient,
    orthogonal_part,
    projector_eigenvalues,
    relative_drift,
    squared_norm,
)
from axolotl_asft.sharding import add_to_gradient, overwrite, whole
from axolotl_asft.spec import METRICS
from axolotl_asft.verify import verify_weights

LOG = logging.getLogger("axolotl.asft")

ON_UNCOVERED = ("error", "warn", "ignore")


@dataclass
class ConstrainedLayer:
    """One LoRA layer and the projector of its alignment direction.

    Attributes:
        found: the layer; its A and B are looked up at every call, since engines replace them.
        U: (out, k), in its stored dtype, on the layer's device.
        c: (k,), eigenvalues of the projector.
        size: ||Y^T d X||_F, the size of what alignment did to the layer, in the metric.
        X, Y: (in, m) and (out, n), the factors of the metric; None: the identity.
        initial: A0 and B0 where the initialisation took scaling B0 A0 out of the base weight.
    """

    found: FoundLayer
    U: Tensor
    c: Tensor
    size: float
    X: Tensor | None = None
    Y: Tensor | None = None
    initial: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def adapter(self) -> str:
        return self.found.adapter

    @property
    def scaling(self) -> float:
        return self.found.scaling

    def update(self) -> tuple[Tensor, Tensor]:
        """The factors of the change from the aligned weight, dW = scaling B A: A (r, in), B (out, r).

        B A - B0 A0 is written as [B - B0, B0] [A; A - A0], of rank 2 r, in which nothing cancels.
        """
        A, B = whole(self.found.A), whole(self.found.B)
        if self.U.device != A.device:
            self.U, self.c = self.U.to(A.device), self.c.to(A.device)
            self.X, self.Y = (None if factor is None else factor.to(A.device) for factor in (self.X, self.Y))
        if self.initial is None:
            return A, B
        A0, B0 = (factor.to(A.device) for factor in self.initial)
        self.initial = A0, B0
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def penalty(self, scaled: bool) -> Tensor:
        """P, with gradients; without PEFT's scaling where not `scaled`."""
        A, B = self.update()  # moves the direction to where the factors are
        return lora_penalty(A, B, self.U, self.c, self.scaling if scaled else 1.0, self.X, self.Y)

    def add_gradient(self, scaled: bool, weight: Tensor | float) -> Tensor:
        """Add weight dP/dA and weight dP/dB to the gradients of A and B; returns P."""
        A, B = self.update()
        scaling = self.scaling if scaled else 1.0
        value, grad_A, grad_B = lora_penalty_gradient(A, B, self.U, self.c, scaling, self.X, self.Y)
        if self.initial is not None:
            r = grad_B.shape[1] // 2
            # A stands in both halves of [A; A - A0], B in the first half of [B - B0, B0]
            grad_A, grad_B = grad_A[:r] + grad_A[r:], grad_B[:, :r]
        for parameter, gradient in ((self.found.A, grad_A), (self.found.B, grad_B)):
            if parameter.requires_grad:
                add_to_gradient(parameter, weight * gradient)
        return value

    def orthogonal(self, A: Tensor, B: Tensor) -> Tensor:
        """||Y^T (I - C) B A X||_F^2 in fp32, without the scaling."""
        A = A.float() if self.X is None else A.float() @ self.X.float()
        Z = orthogonal_part(B.float(), self.U.float(), self.c)
        return squared_norm(Z if self.Y is None else self.Y.float().T @ Z, A)

    def shorten(self, max_drift: float) -> Tensor:
        """Bring ||Y^T (I - C) dW X|| down to max_drift ||Y^T d X||; returns the factor, 1 where it is below already.

        B <- f B + (1 - f) U_1 U_1^T B, with U_1 the columns of U whose eigenvalue is 1: what lies wholly along the
        direction is free and stays, all else shrinks by f, and so does (I - C) B, up to the rounding of U.
        """
        A, B = self.update()
        length = self.scaling * self.orthogonal(A, B).sqrt()
        factor = torch.clamp(max_drift * self.size / torch.clamp(length, min=1e-30), max=1.0)
        free = self.U.float() * (self.c == 1)
        B = B.float()
        overwrite(self.found.B, factor * B + (1 - factor) * (free @ (free.T @ B)))
        return factor


@dataclass(frozen=True)
class LayerDrift:
    """Squared norms of one layer's update dW = scaling B A.

    Attributes:
        orthogonal: ||(I - C) dW||_F^2.
        total: ||dW||_F^2.
        penalty: the layer's part of P: ||Y^T (I - C) dW X||_F^2, without the scaling where that is left out.
        relative: ||Y^T (I - C) dW X||_F / ||Y^T d X||_F: how far off the direction, in units of what alignment did.
    """

    name: str
    orthogonal: float
    total: float
    penalty: float
    relative: float

    @property
    def drift(self) -> float:
        """||(I - C) dW|| / ||dW||: 0 along the alignment direction, 1 orthogonal to it."""
        return relative_drift(self.orthogonal, self.total)


@dataclass
class AlignmentPenalty:
    """P = sum over layers of ||(I - C_l) dW_l||_F^2, a scalar with gradients (AsFT, arXiv 2506.08473).

    Call it to get P, without lambda_reg. See `axolotl_asft.penalty` for its cost. dW is the change from the aligned
    weight: scaling B A, and scaling (B A - B0 A0) where the initialisation (PiSSA and its like) took a part out of
    the weight. With another metric than "weights" it is sum ||Y_l^T (I - C_l) dW_l X_l||_F^2, with X and Y from the
    direction file (`axolotl_asft.metrics`): "activations" measures how far the layers' outputs on safety prompts move,
    "fisher" how far the aligned model's own refusals do. Factors that FSDP2 keeps in pieces are gathered a layer at a
    time; then every rank has to call.

    Args:
        model: a PEFT model (or a model with PEFT's LoRA layers in it) whose base weights are the aligned model's.
        direction: the alignment direction of that model.
        projector: "paper", "normalized" or "subspace".
        rank: use the leading `rank` stored directions alone. None: all under metric="weights", and none under the
            others, since the way back to the base model lies among them and the metric itself says what is free.
        metric: "weights", "activations" or "fisher"; but for the first the direction file has to hold it. None:
            "fisher" where it does, else "weights".
        lora_scaling: False leaves PEFT's scaling out of dW, as the authors' code does.
        modules: regular expressions of the layers to constrain; default: every LoRA layer.
        on_uncovered: "error", "warn" or "ignore" where a trainable weight is not covered by the penalty.
        verify_model: refuse a direction that was extracted for other weights than the model's.

    Raises:
        AsftError: nothing to constrain, a kind of LoRA whose update is not scaling B A, a direction of another
            shape or for another model, or an uncovered weight under on_uncovered="error".
    """

    model: nn.Module = field(repr=False)
    direction: AlignmentDirection = field(repr=False)
    projector: str = "paper"
    rank: int | None = None
    metric: str | None = None
    lora_scaling: bool = True
    modules: list[str] | None = None
    on_uncovered: str = "error"
    verify_model: bool = True
    layers: list[ConstrainedLayer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_choice("projector", self.projector, PROJECTORS)
        _check_choice("on_uncovered", self.on_uncovered, ON_UNCOVERED)
        if self.metric is None:
            held = any("fisher" in module.metrics for module in self.direction.modules.values())
            self.metric = "fisher" if held else "weights"
        _check_choice("metric", self.metric, ("weights", *METRICS))
        if self.rank is not None and self.rank < 0:
            raise AsftError(f"rank is {self.rank}; expected 0 or more, or null for the default")
        if self.rank is None and self.metric != "weights":
            self.rank = 0
        found = {layer.name: layer for layer in trainable_lora_layers(self.model)}
        chosen = select_modules(list(found), self.modules) if self.modules else list(found)
        covered = [name for name in chosen if name in self.direction.modules]
        self._report_uncovered(
            [name for name in chosen if name not in self.direction.modules],
            other_trainable_parameters(self.model, list(found.values())),
        )
        if not covered:
            raise AsftError(
                f"none of the {len(chosen)} LoRA layers has a direction; the model's first is {chosen[0]}, the "
                f"direction file's {next(iter(self.direction.modules))}; use the direction of this model"
            )
        for name in covered:
            _check_shape(found[name], self.direction.modules[name])
        self.layers = [self._constrained(found[name]) for name in covered]
        if not any(layer.X is None or (layer.X.shape[1] and layer.X.any()) for layer in self.layers):
            raise AsftError(
                f"the direction's metric {self.metric} is empty in every layer, so that it would hold nothing; make it "
                f"again with `axolotl asft extract --metric {self.metric}`, or set metric: weights"
            )
        if self.verify_model:
            self._verify()

    def __call__(self) -> Tensor:
        """P as an fp32 scalar, differentiable with respect to every A and B; without lambda_reg."""
        return _sum_on_first_device(layer.penalty(self.lora_scaling) for layer in self.layers)

    def add_gradient(self, weight: Tensor | float = 1.0) -> Tensor:
        """Add the gradient of weight P to the `.grad` of every A and B, in closed form; returns P.

        The same numbers as `(weight * penalty()).backward()`, without a graph and with one layer's temporaries at
        a time. Gradients keep the dtype of their parameters.
        """
        return _sum_on_first_device(layer.add_gradient(self.lora_scaling, weight) for layer in self.layers)

    @torch.no_grad()
    def measure(self) -> list[LayerDrift]:
        """The drift of every layer now, with PEFT's scaling whatever `lora_scaling` says."""
        values = []
        for layer in self.layers:
            A, B = (factor.float() for factor in layer.update())
            orthogonal = squared_norm(orthogonal_part(B, layer.U.float(), layer.c), A)
            penalty = orthogonal if self.metric == "weights" else layer.orthogonal(A, B)
            values.append((torch.stack([orthogonal, squared_norm(B, A), penalty]) * layer.scaling**2).cpu())
        return [
            LayerDrift(
                layer.name,
                orthogonal,
                total,
                penalty if self.lora_scaling else penalty / layer.scaling**2,
                relative_drift(penalty, layer.size**2),
            )
            for layer, (orthogonal, total, penalty) in zip(self.layers, torch.stack(values).tolist(), strict=True)
        ]

    @torch.no_grad()
    def shorten(self, max_drift: float) -> Tensor:
        """Keep ||Y_l^T (I - C_l) dW_l X_l|| <= max_drift ||Y_l^T d_l X_l|| in every layer l; the smallest factor.

        A budget with a meaning that carries over between models: fine-tuning may move a layer off the alignment
        direction by at most this multiple of what alignment moved it. To be called after every optimizer step.
        """
        factors = [layer.shorten(max_drift) for layer in self.layers]
        return torch.stack([factor.to(factors[0].device) for factor in factors]).min()

    def _constrained(self, found: FoundLayer) -> ConstrainedLayer:
        module = self.direction.modules[found.name]
        k = module.rank if self.rank is None else min(self.rank, module.rank)
        c = projector_eigenvalues(self.projector, module.S, module.norm)[:k]
        if found.was_taken_out and found.A.is_meta:
            raise AsftError(
                f"{found.name} is initialised by {found.initialisation!r}, and its weights are not loaded here; "
                "set fsdp_config.cpu_ram_efficient_loading: false"
            )
        initial = (found.A.detach().clone(), found.B.detach().clone()) if found.was_taken_out else None
        # a meta device has nothing on it yet; U follows A when it is first used
        device = torch.device("cpu") if found.A.is_meta else found.A.device
        X, Y, size = None, None, module.norm
        if self.metric is not None and self.metric != "weights":
            if (metric := module.metrics.get(self.metric)) is None:
                raise AsftError(
                    f"metric is {self.metric!r}, which the direction file does not hold (first {found.name}); make it "
                    f"with `axolotl asft extract --metric {self.metric}`, or set metric: weights"
                )
            X, size = metric.inputs.to(device), metric.norm
            Y = None if metric.outputs is None else metric.outputs.to(device)
        U = module.U[:, :k].contiguous().to(device)
        return ConstrainedLayer(found, U, c.to(device), float(size), X, Y, initial)

    def _verify(self) -> None:
        if any(layer.found.initialisation == "loftq" for layer in self.layers):
            raise AsftError(
                "LoftQ replaced the weights by rounded ones, so that they cannot be compared with the direction's; "
                "make sure that it is the direction of this model, and set verify_model: false"
            )
        weights = []
        for layer in self.layers:
            if layer.found.base_weight.is_meta:
                continue
            taken_out = None if layer.initial is None else (layer.initial[0], layer.scaling * layer.initial[1])
            weights.append((layer.name, layer.found.base_weight, taken_out))
        # under FSDP the other processes may wait for the weights of the first, which looks at them
        if weights or int(os.environ.get("RANK", "0")) == 0:
            verify_weights(self.direction, weights)

    def _report_uncovered(self, layers: list[str], others: list[str]) -> None:
        if self.on_uncovered == "ignore" or not (layers or others):
            return
        what = []
        if layers:
            what.append(f"{len(layers)} LoRA layers without a direction (first {layers[0]})")
        if others:
            what.append(f"{len(others)} trainable weights that are no LoRA layer (first {others[0]})")
        text = f"the penalty does not cover {' and '.join(what)}, so training can leave the alignment direction there"
        if self.on_uncovered == "error":
            raise AsftError(f"{text}; leave them out of training, or set asft.on_uncovered: warn")
        LOG.warning(text)


def _sum_on_first_device(values) -> Tensor:
    total: Tensor | None = None
    for value in values:
        total = value if total is None else total + value.to(total.device)
    assert total is not None  # __post_init__ refuses a model without covered layers
    return total


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AsftError(f"{key} is {value!r}; expected one of {', '.join(choices)}")


def _check_shape(layer: FoundLayer, module: ModuleDirection) -> None:
    if layer.shape != module.shape:
        raise AsftError(
            f"{layer.name} is {layer.shape} (out, in) in the model and {module.shape} in the direction; use the "
            "direction of this model"
        )
