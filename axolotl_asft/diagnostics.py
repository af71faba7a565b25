"""How far an adapter has drifted from the alignment direction: live, or from its saved files."""

import math
from dataclasses import dataclass
from pathlib import Path

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.penalty import LayerDrift, orthogonal_part, relative_drift, squared_norm
from axolotl_asft.saved import SavedAdapter


@dataclass(frozen=True)
class DriftReport:
    """The drift of a whole model; NaN where a layer's numbers are NaN.

    Attributes:
        layers: one entry a layer.
    """

    layers: tuple[LayerDrift, ...]

    @property
    def update_norm(self) -> float:
        """||dW||_F over all layers."""
        return math.sqrt(max(sum(layer.total for layer in self.layers), 0.0))

    @property
    def penalty(self) -> float:
        """P, without lambda_reg."""
        return sum(layer.penalty for layer in self.layers)

    @property
    def max_drift(self) -> float:
        """max over layers of ||Y^T (I - C) dW X|| / ||Y^T d X||: what the key of that name bounds.

        Over the layers that moved and have a yardstick; NaN where none of those that moved has one, 0 where none moved.
        """
        moved = [layer for layer in self.layers if layer.penalty != 0]  # as NaN is
        known = [layer.relative for layer in moved if layer.has_yardstick]
        if not known or any(map(math.isnan, known)):
            return math.nan if moved else 0.0
        return max(known)

    @property
    def drift(self) -> float:
        """||(I - C) dW|| / ||dW|| over all layers, 0 to 1."""
        return relative_drift(sum(x.orthogonal for x in self.layers), sum(x.total for x in self.layers))


def adapter_drift(
    adapter: str | Path,
    direction: AlignmentDirection,
    projector: str = "paper",
    rank: int | None = None,
) -> DriftReport:
    """The drift of a saved PEFT LoRA adapter, without loading its model.

    Its penalty and its relative drift are those of the weights, ||(I - C) dW||, with PEFT's scaling, whatever metric
    the adapter was trained under and the direction file holds.

    Args:
        adapter: folder with `adapter_model.safetensors` and `adapter_config.json`.
        direction, projector, rank: as for `AlignmentPenalty`.

    Raises:
        AsftError: no such adapter, or one of its layers has no direction or one of another shape.
    """
    layers = []
    for layer in SavedAdapter.read(adapter).layers():
        if layer.name not in direction.modules:
            raise AsftError(f"{adapter} has a layer {layer.name} without a direction; use the direction of its model")
        module = direction.modules[layer.name]
        A, B = layer.A.float(), layer.B.float()
        module.check_shape(layer.name, (B.shape[0], A.shape[1]), "adapter")
        U, c = module.projector(projector, rank)
        factor = layer.scaling**2
        orthogonal = factor * float(squared_norm(orthogonal_part(B, U.float(), c), A))
        total = factor * float(squared_norm(B, A))
        relative = relative_drift(orthogonal, float(module.norm) ** 2)
        layers.append(LayerDrift(layer.name, orthogonal, total, orthogonal, relative))
    return DriftReport(tuple(layers))
