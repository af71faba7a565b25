"""How far an adapter has drifted from the alignment direction: live, or from its saved files."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from axolotl_asft.adapter import LayerDrift
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.lora import takes_out
from axolotl_asft.penalty import orthogonal_part, projector_eigenvalues, relative_drift, squared_norm

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


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
    folder = Path(adapter)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / ADAPTER_WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise AsftError(f"{folder} is no readable PEFT adapter ({error}); expected {ADAPTER_WEIGHTS}") from error
    if takes_out(config.get("init_lora_weights", True)):
        raise AsftError(
            f"{folder} was initialised by {config['init_lora_weights']!r}, so that B A is not the change from the "
            "original weight; read its drift in the training log, or convert it to a plain LoRA with PEFT first"
        )
    layers = []
    for key in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name not in direction.modules:
            raise AsftError(f"{folder} has a layer {name} without a direction; use the direction of its model")
        module = direction.modules[name]
        A, B = tensors[key].float(), tensors[key.replace(".lora_A.", ".lora_B.")].float()
        k = module.rank if rank is None else min(rank, module.rank)
        c = projector_eigenvalues(projector, module.S, module.norm)[:k]
        scale = _scaling(config, name, A.shape[0]) ** 2
        orthogonal = squared_norm(orthogonal_part(B, module.U[:, :k].float(), c), A)
        layers.append(LayerDrift(name, scale * float(orthogonal), scale * float(squared_norm(B, A))))
    return DriftReport(tuple(layers))


def _scaling(config: dict, name: str, rank: int) -> float:
    """PEFT's scaling of one layer: alpha / r, alpha / sqrt(r) for rsLoRA."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), name) if patterns else name
    alpha = patterns.get(key, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
