"""Checkpoints made and changed on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def copied(folder: Path, to: Path, change=lambda tensors: None, config=lambda config: None) -> Path:
    """A checkpoint copied with its tensors and its config changed."""
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    to.mkdir()
    save_file(tensors, str(to / "model.safetensors"))
    content = json.loads((folder / "config.json").read_text())
    config(content)
    (to / "config.json").write_text(json.dumps(content))
    return to


def write_wide_checkpoint(folder: Path, layers: int, seed: int, side: int = 1024) -> Path:
    """Weights of side x side, one file a layer: 4 MB each."""
    folder.mkdir(parents=True)
    weight_map = {}
    for layer in range(layers):
        name, file = f"model.layers.{layer}.mlp.up_proj.weight", f"model-{layer}.safetensors"
        generator = torch.Generator().manual_seed(layer)
        weight = torch.randn(side, side, generator=generator)
        save_file({name: weight + 0.01 * seed * torch.randn(side, side, generator=generator)}, str(folder / file))
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
