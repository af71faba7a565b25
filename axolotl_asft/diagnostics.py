"""How far an adapter has drifted from the alignment direction: live, or from its saved files."""

import math
from dataclasses import dataclass
from pathlib import Path

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.penalty import orthogonal_part, projector_eigenvalues, relative_drift, squared_norm
from axolotl_asft.saved import SavedAdapter


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


@dataclass(frozen=True)
class DriftReport:
    """The drift of a whole model.

    Attributes:
        layers: one entry a layer.
    """

    layers: tuple[LayerDrift, ...]

    @property
    def orthogonal_norm(self) -> float:
        """||(I - C) dW||_F over all layers."""
        return math.sqrt(sum(layer.orthogonal for layer in self.layers))

    @property
    def update_norm(self) -> float:
        """||dW||_F over all layers."""
        return math.sqrt(sum(layer.total for layer in self.layers))

    @property
    def penalty(self) -> float:
        """P, without lambda_reg."""
        return sum(layer.penalty for layer in self.layers)

    @property
    def max_drift(self) -> float:
        """max over layers of ||(I - C) dW M|| / ||d M||: what the key of that name bounds."""
        return max((layer.relative for layer in self.layers), default=0.0)

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

    Args:
        adapter: folder with `adapter_model.safetensors` and `adapter_config.json`.
        direction, projector, rank: as for `AlignmentPenalty`.

    Raises:
        AsftError: no such adapter, or one of its layers has no direction.
    """
    layers = []
    for layer in SavedAdapter.read(adapter).layers():
        if layer.name not in direction.modules:
            raise AsftError(f"{adapter} has a layer {layer.name} without a direction; use the direction of its model")
        module = direction.modules[layer.name]
        A, B = layer.A.float(), layer.B.float()
        k = module.rank if rank is None else min(rank, module.rank)
        c = projector_eigenvalues(projector, module.S, module.norm)[:k]
        factor = layer.scaling**2
        orthogonal = factor * float(squared_norm(orthogonal_part(B, module.U[:, :k].float(), c), A))
        total = factor * float(squared_norm(B, A))
        layers.append(LayerDrift(layer.name, orthogonal, total, orthogonal, relative_drift(orthogonal, module.norm**2)))
    return DriftReport(tuple(layers))
