"""What the aligned model was asked for its direction, as kept on disk: an interrupted extraction asks only once."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from axolotl_asft.console import Stage, silent
from axolotl_asft.errors import one_line
from axolotl_asft.evaluation.kept import hash_of
from axolotl_asft.evaluation.models import model_state
from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.safety_metrics import AskedModel, safety_metrics, sets_of
from axolotl_asft.files import atomic_write
from axolotl_asft.history import installed_versions
from axolotl_asft.metrics import LayerMetric, ModelMetric

LOG = logging.getLogger("axolotl.asft")


def asked_once(
    path: Path,
    model: str,
    names: Sequence[str],
    prompts: str | Sequence[str] = "harmful",
    harmless: str | None = "borderline",
    *,
    stage: Stage = silent,
    **how: Any,
) -> AskedModel:
    """`safety_metrics(model, names, prompts, harmless, **how)`, kept in `path`, and taken from there where the same was
    asked.

    The same: the model's files, the texts of all prompts, every argument, and the versions of the libraries. What
    cannot be kept, for want of room say, costs a warning.

    Args:
        model: a folder.
    """
    sets = sets_of(prompts), sets_of(harmless or ())
    asked = [[prompt.prompt for each in part for prompt in load_prompts(each, "train")] for part in sets]
    key = hash_of([model, model_state(model), list(names), asked, how, installed_versions()])
    known = _read(path, key)
    if known is not None:
        stage("already measured by an earlier call", 1)(1)
        return known
    found = safety_metrics(model, names, prompts, harmless, stage=stage, **how)
    try:
        _write(path, key, found)
    except (OSError, SafetensorError) as error:
        LOG.warning(
            "the measurements on the aligned model cannot be saved (%s); if interrupted, they will be repeated",
            one_line(error),
        )
    return found


def _write(path: Path, key: str, asked: AskedModel) -> None:
    tensors: dict[str, torch.Tensor] = {}
    described = []
    for metric in asked.metrics:
        for layer, held in metric.layers.items():
            tensors |= {f"{metric.name}/{layer}/{side}": factor for side, factor in _factors(held).items()}
        energies = {layer: held.energy for layer, held in metric.layers.items()}
        described.append({"name": metric.name, "answers": metric.answers, "scale": metric.scale, "energies": energies})
    metadata = {"key": key, "asked": json.dumps({"metrics": described, "own_answers": asked.own_answers})}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))


def _factors(layer: LayerMetric) -> dict[str, torch.Tensor]:
    held = {"X": layer.X.contiguous()}
    return held if layer.Y is None else held | {"Y": layer.Y.contiguous()}


def _read(path: Path, key: str) -> AskedModel | None:
    """What was kept under this key; None where nothing was, or cannot be read any more."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            asked, names = json.loads(metadata["asked"]), set(file.keys())

            def layer(metric: str, name: str, energy: float) -> LayerMetric:
                outputs = f"{metric}/{name}/Y"
                Y = file.get_tensor(outputs) if outputs in names else None
                return LayerMetric(file.get_tensor(f"{metric}/{name}/X"), Y, energy)

            metrics = [
                ModelMetric(
                    each["name"],
                    {name: layer(each["name"], name, energy) for name, energy in each["energies"].items()},
                    each["answers"],
                    each["scale"],
                )
                for each in asked["metrics"]
            ]
            return AskedModel(metrics, [(request, answer) for request, answer in asked["own_answers"]])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
