"""The penalty over the LoRA layers of a PEFT model, matched to directions by whole name."""

import os
from dataclasses import replace

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from axolotl_asft.direction import ON_UNCOVERED, AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.fingerprint import with_scales
from axolotl_asft.layer_groups import ConstrainedLayer, LayerGroup, grouped
from axolotl_asft.lora import FoundLayer, plain_weights
from axolotl_asft.matching import match, report_gaps
from axolotl_asft.penalty import PROJECTORS, LayerDrift, relative_drift
from axolotl_asft.spec import METRICS
from axolotl_asft.verify import verify_weights


class AlignmentPenalty:
    """P = sum over layers of ||(I - C_l) dW_l||_F^2, a scalar with gradients (AsFT, arXiv 2506.08473).

    Call it to get P, without lambda_reg. See `axolotl_asft.penalty` for its cost. dW is the change from the aligned
    weight: scaling B A, and scaling (B A - B0 A0) where the initialisation (PiSSA and its like) took a part out of
    the weight. With another metric than "weights" it is sum ||Y_l^T (I - C_l) dW_l X_l||_F^2, with X and Y from the
    direction file (`axolotl_asft.metrics`): "activations" measures how far the layers' outputs on safety prompts move,
    "fisher" how far the aligned model's own refusals do. Layers of one shape are taken together, a few MB at a time
    (`axolotl_asft.layer_groups`). Factors that FSDP2 shards are gathered in the same turns; then every rank has to
    call.

    Args:
        model: a PEFT model (or a model with PEFT's LoRA layers in it) whose base weights are the aligned model's.
        direction: the alignment direction of that model.
        projector: "paper", "normalized" or "subspace".
        rank: use only the leading `rank` stored directions. None: all of them for metric="weights"; 0 otherwise,
            because the stored directions include the path back to the base model, and the metric itself says what is
            free.
        metric: "weights", "activations" or "fisher"; the direction file has to hold the latter two. None: "fisher" if
            the file holds it, else "weights".
        lora_scaling: False omits PEFT's scaling from dW, as the authors' code does.
        modules: regular expressions of the layers to constrain; default: every LoRA layer.
        on_uncovered: "error", "warn" or "ignore" if a trainable weight is not covered by the penalty.
        verify_model: refuse a direction that was extracted for weights other than this model's.

    Attributes:
        layers: the constrained LoRA layers, in the model's order.
        groups: the same by shape, with their directions.
        match: what of the model is covered, and what is not and why.
        uncovered: how many LoRA layers and other weights train without the penalty, by `modules` and `on_uncovered`.

    Raises:
        AsftError: nothing to constrain, a kind of LoRA whose update is not scaling B A, a direction of another
            shape or for another model, or an uncovered weight under on_uncovered="error".
    """

    def __init__(
        self,
        model: nn.Module,
        direction: AlignmentDirection,
        projector: str = "paper",
        rank: int | None = None,
        metric: str | None = None,
        lora_scaling: bool = True,
        modules: list[str] | None = None,
        on_uncovered: str = "error",
        verify_model: bool = True,
    ):
        if metric is None:
            held = any("fisher" in module.metrics for module in direction.modules.values())
            metric = "fisher" if held else "weights"
        _check_choice("projector", projector, PROJECTORS)
        _check_choice("on_uncovered", on_uncovered, ON_UNCOVERED)
        _check_choice("metric", metric, ("weights", *METRICS))
        if rank is not None and rank < 0:
            raise AsftError(f"rank is {rank}; expected 0 or more, or null for the default")
        self.model, self.direction = model, direction
        self.projector, self.metric = projector, metric
        self.rank = 0 if rank is None and metric != "weights" else rank
        self.lora_scaling, self.modules = lora_scaling, modules
        self.on_uncovered, self.verify_model = on_uncovered, verify_model
        found = self.match = match(model, direction, metric, modules)
        self._matched = {(id(layer.layer), layer.adapter): layer for layer in found.trained}
        self._others = {_steady(name) for name in found.others}
        self.uncovered = len(found.trained) - len(found.covered) + len(found.others) + len(found.frozen)
        report_gaps(found, metric, on_uncovered)
        self.layers = found.covered
        for layer in self.layers:
            direction.modules[layer.name].check_shape(layer.name, layer.shape, "model")
        self.groups: list[LayerGroup] = grouped(self._constrained(layer) for layer in self.layers)
        if verify_model:
            self._verify()

    def __repr__(self) -> str:
        return (
            f"AlignmentPenalty({len(self.layers)} layers, projector={self.projector!r}, rank={self.rank}, "
            f"metric={self.metric!r}, lora_scaling={self.lora_scaling})"
        )

    def __call__(self) -> Tensor:
        """P as an fp32 scalar, differentiable with respect to every A and B; without lambda_reg."""
        return _sum_on_first_device(group.penalty(self.lora_scaling) for group in self.groups)

    def add_gradient(self, weight: Tensor | float = 1.0) -> Tensor:
        """Add the gradient of weight P to the `.grad` of every A and B, in closed form; returns P.

        The same numbers as `(weight * penalty()).backward()`, without a graph and with one group's temporaries at
        a time. Gradients keep the dtype of their parameters. Nothing waits for the device.
        """
        return _sum_on_first_device(group.add_gradient(self.lora_scaling, weight) for group in self.groups)

    def refuse_changed(self, model: nn.Module) -> None:
        """Refuse a model whose trainable weights are not those that were matched when this was made.

        Frozen LoRA layers too: a checkpoint that was loaded since may have brought what an earlier run taught them.
        Under on_uncovered="warn" or "ignore" those are counted among the uncovered.

        Raises:
            AsftError: it names one; it would change the model without the constraint.
        """
        now = match(model, self.direction, self.metric, self.modules)
        new = [layer.name for layer in now.trained if (id(layer.layer), layer.adapter) not in self._matched]
        new += sorted({_steady(name) for name in now.others} - self._others)
        if new or len(now.trained) != len(self._matched):
            what = f"{len(new)} other weights train (first {new[0]})" if new else "LoRA layers no longer train"
            raise AsftError(
                f"{what} than when the constraint was attached, which would go unconstrained; attach it to the "
                "complete model, right before train()"
            )
        late = [name for name in now.frozen if name not in self.match.frozen]
        report_gaps(replace(now, uncovered={}, others=[], frozen=late), self.metric, self.on_uncovered)
        self.match = replace(self.match, frozen=[*self.match.frozen, *late])
        self.uncovered += len(late)

    def start_alike(self, device: torch.device) -> None:
        """Several processes: where an initialisation took a part out, all measure from that of the first."""
        for group in self.groups:
            if group.initial is not None:
                A0, B0 = broadcast([factor.to(device) for factor in group.initial])
                group.initial = A0, B0

    @torch.no_grad()
    def measure(self) -> list[LayerDrift]:
        """The drift of every layer now, with PEFT's scaling whatever `lora_scaling` says."""
        # sizes ride along: one copy from the device for all
        rows = [torch.cat([group.squared_norms(), group.sizes[:, None]], dim=1) for group in self.groups]
        numbers = torch.cat([row.to(rows[0].device) for row in rows]).tolist()
        found = [layer for group in self.groups for layer in group.found]
        measured = {
            layer.name: LayerDrift(
                layer.name,
                orthogonal,
                total,
                penalty if self.lora_scaling else penalty / layer.scaling**2,
                relative_drift(penalty, size**2),
            )
            for layer, (orthogonal, total, penalty, size) in zip(found, numbers, strict=True)
        }
        return [measured[layer.name] for layer in self.layers]

    def unmoved(self) -> list[str]:
        """Names of the layers of which alignment moved nothing in the metric, so that every multiple of it is 0."""
        sizes = {
            found.name: size
            for group in self.groups
            for found, size in zip(group.found, group.sizes.tolist(), strict=True)
        }
        return [layer.name for layer in self.layers if sizes[layer.name] == 0]

    @torch.no_grad()
    def shorten(self, max_drift: float) -> Tensor:
        """Keep ||Y_l^T (I - C_l) dW_l X_l|| <= max_drift ||Y_l^T d_l X_l|| in every layer l; the smallest factor.

        A budget with a meaning that carries over between models: fine-tuning may move a layer off the alignment
        direction by at most this multiple of what alignment moved it. To be called after every optimizer step.
        """
        factors = [group.shorten(max_drift) for group in self.groups]
        return torch.cat([factor.to(factors[0].device) for factor in factors]).min()

    def _constrained(self, found: FoundLayer) -> ConstrainedLayer:
        module = self.direction.modules[found.name]
        U, c = module.projector(self.projector, self.rank)
        if found.was_taken_out and found.A.is_meta:
            raise AsftError(
                f"{found.name} is initialised by {found.initialisation!r}, and its weights are not loaded here; "
                "set fsdp_config.cpu_ram_efficient_loading: false"
            )
        initial = (found.A.detach().clone(), found.B.detach().clone()) if found.was_taken_out else None
        X, Y, size = None, None, module.norm
        if self.metric != "weights":
            metric = module.metrics[self.metric]
            X, Y, size = metric.inputs, metric.outputs, metric.norm
        return ConstrainedLayer(found, U, c, float(size), X, Y, initial)

    def _verify(self) -> None:
        if any(layer.initialisation == "loftq" for layer in self.layers):
            raise AsftError(
                "LoftQ replaced the weights with rounded ones, so they cannot be compared with the direction's; make "
                "sure that it is the direction of this model, and set verify_model: false"
            )
        weights = []
        for layer in self.layers:
            if layer.base_weight is None or layer.base_weight.is_meta:
                continue
            taken_out = (layer.A.detach(), layer.scaling * layer.B.detach()) if layer.was_taken_out else None
            weight = with_scales(layer.base_weight, layer.layer.get_base_layer())
            weights.append((layer.name, weight, taken_out))
        for name, module, weight in plain_weights(self.model):  # LoRA may be on some of the layers alone
            if name in self.direction.modules and not weight.is_meta:
                weights.append((name, with_scales(weight, module), None))
        # under FSDP the other processes may wait for the weights of the first, which looks at them
        if weights or int(os.environ.get("RANK", "0")) == 0:
            verify_weights(self.direction, weights)


def _steady(name: str) -> str:
    """A weight's name, whether it is compiled meanwhile or not."""
    return name.replace("_orig_mod.", "")


def _sum_on_first_device(values) -> Tensor:
    total: Tensor | None = None
    for value in values:
        total = value if total is None else total + value.to(total.device)
    assert total is not None  # __init__ refuses a model without covered layers
    return total


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AsftError(f"{key} is {value!r}; expected one of {', '.join(choices)}")
