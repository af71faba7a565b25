"""Lazy reading of safetensors checkpoints, local or on the Hub: names and shapes at once, tensors one at a time."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_asft.errors import AsftError
from axolotl_asft.files import read_json
from axolotl_asft.hub import HubFile, cached_folder, commit_of, hub_model, small_file, weight_files
from axolotl_asft.naming import model_names
from axolotl_asft.tensor_files import LocalFile, RemoteFile, TensorFile, torch_dtype

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# model.layers.0.*, transformer.h.0.*, gpt_neox.layers.0.*, ...: the numbered blocks of a decoder
DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.")
# What GPTQ, AWQ, compressed-tensors, bitsandbytes and FP8 keep beside a weight, or in its place.
PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")
# These keep their linear weights as (in, out), in transformers' Conv1D.
TRANSPOSED_MODEL_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it.

    Attributes:
        file: the file that holds it.
        name: as it is called there.
        shape: as stored.
        dtype: safetensors' name of it.
    """

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors can be read one by one; opening it reads headers alone.

    Attributes:
        location: the folder, or owner/name@commit on the Hub.
        name: how the model is called in a direction file: owner/name, or the folder's name, never its whole path.
        tensors: by their names in the model, where transformers renames them as it loads.
        transposed: True where linear weights are stored (in, out).
        revision: the commit on the Hub; None of a folder.
    """

    location: str
    name: str
    tensors: dict[str, StoredTensor] = field(repr=False)
    transposed: bool = False
    revision: str | None = None

    @classmethod
    def open(cls, location: str | Path) -> "Checkpoint":
        """Open a folder, or a model on the Hub as `owner/name[@revision]`, in one safetensors file or in shards.

        A model of the Hub is read from the Hub's cache where it is there; else tensor by tensor from the Hub, which
        keeps nothing on disk but config.json and the index.

        Raises:
            AsftError: no such folder or model, no safetensors in it, or a file that cannot be read.
        """
        if (wanted := hub_model(location)) is not None:
            return _open_remote(wanted)
        folder = _existing_folder(location)
        files: list[TensorFile] = [LocalFile(file) for file in _weight_files(folder)]
        return _checkpoint(str(folder), folder.resolve().name, folder, files)

    def linear_weights(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear weight inside the decoder layers."""
        weights = {}
        for name, tensor in self.tensors.items():
            if name.endswith(".weight") and len(tensor.shape) == 2 and DECODER_LAYER.search(name):
                rows, columns = tensor.shape
                weights[name.removesuffix(".weight")] = (columns, rows) if self.transposed else (rows, columns)
        return weights

    def weight(self, module: str) -> Tensor:
        """The weight of `module` in its stored dtype, oriented (out, in).

        Raises:
            AsftError: the tensor is not of a floating-point dtype, or its file cannot be read.
        """
        stored = self.tensors[f"{module}.weight"]
        torch_dtype(self.location, f"{module}.weight", stored.dtype)
        weight = stored.file.tensor(stored.name)
        return weight.T if self.transposed else weight

    def values(self, module: str, start: int, count: int) -> Tensor:
        """(count,) consecutive values of the flattened (out, in) weight, read without the rest of it.

        Raises:
            AsftError: the file cannot be read, or lies on the Hub and the tensor is not of a floating-point dtype.
        """
        stored = self.tensors[f"{module}.weight"]
        columns = stored.shape[0 if self.transposed else 1]
        first, last = start // columns, (start + count - 1) // columns + 1
        if self.transposed:
            rows = stored.file.tensor(stored.name)[:, first:last].T
        else:
            rows = stored.file.rows(stored.name, first, last)
        return rows.reshape(-1)[start - first * columns :][:count]


def _checkpoint(location: str, name: str, folder: Path, files: list[TensorFile]) -> Checkpoint:
    """A checkpoint of these files, with its config.json in `folder`."""
    config = _config(folder)
    headers = {key: StoredTensor(file, key, *entry) for file in files for key, entry in file.entries().items()}
    if quantised := _quantisation(config, headers):
        raise AsftError(
            f"{location} is a quantised checkpoint ({quantised}), whose rounding is larger than the difference between "
            "a base and its aligned model; give the full-precision model that it was made from"
        )
    return Checkpoint(
        location=location,
        name=name,
        tensors={renamed: headers[stored] for stored, renamed in model_names(folder, config, headers).items()},
        transposed=config.get("model_type") in TRANSPOSED_MODEL_TYPES,
    )


def _quantisation(config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """How a checkpoint is quantised, in a few words; None where it is not."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is not None:
        settings = settings if isinstance(settings, dict) else {}
        method = str(settings.get("quant_method") or "an unknown method")
        bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
        return f"{method}, {bits} bit" if bits else method
    packed = next((name for name in tensors if name.endswith(PACKED)), None)
    return f"it has {packed}" if packed else None


def _open_remote(model: HubFile) -> Checkpoint:
    """A model of the Hub: from its cache if it is there whole, else file by file and range by range."""
    names = [SINGLE_NAME]  # before an index, as transformers takes it
    folder = cached_folder(model, ["config.json", *names])
    index = cached_folder(model, [INDEX_NAME]) if folder is None else None
    if index is not None:
        names = _shards(index / INDEX_NAME)
        folder = cached_folder(model, ["config.json", *names])
    if folder is not None:
        files: list[TensorFile] = [LocalFile(folder / name) for name in names]
        commit = commit_of(folder / "config.json")
    else:
        commit, there = weight_files(model)
        model = replace(model, revision=commit)
        if SINGLE_NAME in there:
            names = [SINGLE_NAME]
        elif INDEX_NAME in there:
            names = _shards(small_file(replace(model, file=INDEX_NAME)))
        else:
            others = [name for name in there if name.endswith((".bin", ".pt", ".gguf"))]
            instead = f" (it has {others[0]}: download and convert it, see docs/directions.md)" if others else ""
            raise AsftError(
                f"{model} holds no {SINGLE_NAME} and no {INDEX_NAME}{instead}; expected a safetensors checkpoint"
            )
        if missing := [name for name in [*names, "config.json"] if name not in there]:
            raise AsftError(f"{model} lacks {len(missing)} of its files, the first {missing[0]}")
        folder = small_file(replace(model, file="config.json")).parent
        files = [RemoteFile(replace(model, file=name)) for name in names]
    checkpoint = _checkpoint(model.at(commit) if commit else str(model), model.repo, folder, files)
    return replace(checkpoint, revision=commit)


def _existing_folder(location: str | Path) -> Path:
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf":
        raise _gguf(folder)
    if folder.is_file():
        raise AsftError(f"{folder} is a file; expected the checkpoint folder that holds {SINGLE_NAME}")
    raise AsftError(f"no checkpoint folder at {location}; check the path, or give owner/name of a model on the Hub")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "download the checkpoint again")


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_NAME).is_file():  # before an index, as transformers takes it
        return [folder / SINGLE_NAME]
    index = folder / INDEX_NAME
    if index.is_file():
        files = [folder / name for name in _shards(index)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise AsftError(f"{folder} lacks {len(missing)} of its {len(files)} shards, the first {missing[0]}")
        return files
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise AsftError(
            f"{folder} holds pickled weights (.bin or .pt), which can run code when read; expected {SINGLE_NAME}; "
            "convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    for file in sorted(folder.glob("*.gguf")):
        raise _gguf(file)
    raise AsftError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; expected a safetensors checkpoint")


def _gguf(file: Path) -> AsftError:
    return AsftError(
        f"{file} is GGUF; expected safetensors; a file in F32, F16 or BF16 can be converted with "
        f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='{file.name}').save_pretrained(...), a quantised one "
        "has lost the difference to rounding: give the model it was made from"
    )


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists; an index is no place for paths: a shard lies beside it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AsftError(f"{index} has no weight_map; download the checkpoint again")
    return sorted({Path(str(name)).name for name in weight_map.values()})


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name` ("bfloat16", "float16", "float32").

    Raises:
        AsftError: any other name.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise AsftError(f"dtype is {name!r}; expected one of {', '.join(known)}")
    return known[name]
