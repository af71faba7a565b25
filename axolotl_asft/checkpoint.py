"""Lazy reading of local safetensors checkpoints: names and shapes at once, tensors one at a time."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from axolotl_asft.errors import AsftError
from axolotl_asft.naming import model_names

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# model.layers.0.*, transformer.h.0.*, gpt_neox.layers.0.*, ...: the numbered blocks of a decoder
DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.")
# These keep their linear weights as (in, out), in transformers' Conv1D.
TRANSPOSED_MODEL_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors can be read one by one; opening it reads headers alone.

    Attributes:
        path: the folder.
        name: how the model is called in a direction file: the folder's name, never its whole path.
        stored: tensor name in the model -> as stored, where transformers renames it as it loads.
        files: tensor name in the model -> the file that holds it.
        shapes: tensor name -> shape as stored.
        dtypes: tensor name -> safetensors' dtype name.
        transposed: True where linear weights are stored (in, out).
    """

    path: Path
    name: str
    stored: dict[str, str] = field(repr=False)
    files: dict[str, Path] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: dict[str, str] = field(repr=False)
    transposed: bool = False

    @classmethod
    def open(cls, location: str | Path) -> "Checkpoint":
        """Open a local folder that holds `model.safetensors`, or shards with their index.

        Raises:
            AsftError: no such folder, no safetensors in it, or a file that cannot be read.
        """
        folder = _existing_folder(location)
        config = _config(folder)
        if config.get("quantization_config"):
            raise AsftError(
                f"{folder} is a quantised checkpoint (config.json has quantization_config); expected full-precision "
                "weights; give the original model instead"
            )
        headers: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for file in _weight_files(folder):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not iterable itself
                    view = tensors.get_slice(name)
                    headers[name] = file, tuple(view.get_shape()), view.get_dtype()
        stored = {renamed: name for name, renamed in model_names(folder, config, headers).items()}
        return cls(
            path=folder,
            name=folder.resolve().name,
            stored=stored,
            files={renamed: headers[name][0] for renamed, name in stored.items()},
            shapes={renamed: headers[name][1] for renamed, name in stored.items()},
            dtypes={renamed: headers[name][2] for renamed, name in stored.items()},
            transposed=config.get("model_type") in TRANSPOSED_MODEL_TYPES,
        )

    def linear_weights(self) -> dict[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear weight inside the decoder layers."""
        weights = {}
        for name, shape in self.shapes.items():
            if name.endswith(".weight") and len(shape) == 2 and DECODER_LAYER.search(name):
                rows, columns = shape
                weights[name.removesuffix(".weight")] = (columns, rows) if self.transposed else (rows, columns)
        return weights

    def weight(self, module: str) -> Tensor:
        """The weight of `module` in its stored dtype, oriented (out, in).

        Raises:
            AsftError: the tensor is not of a floating-point dtype, or its file cannot be read.
        """
        name = f"{module}.weight"
        if self.dtypes[name] not in FLOAT_DTYPES:
            raise AsftError(
                f"{self.path}: {name} is {self.dtypes[name]}; expected one of {', '.join(sorted(FLOAT_DTYPES))}; "
                "give a full-precision checkpoint"
            )
        with _opened(self.files[name]) as tensors:
            weight = tensors.get_tensor(self.stored[name])
        return weight.T if self.transposed else weight

    def values(self, module: str, start: int, count: int) -> Tensor:
        """(count,) consecutive values of the flattened (out, in) weight, read without the rest of it."""
        columns = self.linear_weights()[module][1]
        first, last = start // columns, (start + count - 1) // columns + 1
        with _opened(self.files[f"{module}.weight"]) as tensors:
            view = tensors.get_slice(self.stored[f"{module}.weight"])
            rows = view[:, first:last].T if self.transposed else view[first:last]
        return rows.reshape(-1)[start - first * columns :][:count]


def _existing_folder(location: str | Path) -> Path:
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise AsftError(f"{folder} is a file; expected the checkpoint folder that holds {SINGLE_NAME}")
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)):
        hint = f"; a Hub model has to be downloaded first: hf download {location} --local-dir {folder.name}"
    raise AsftError(f"no checkpoint folder at {location}{hint or '; check the path'}")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AsftError(f"{path} cannot be read as JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise AsftError(f"{path} holds no JSON object; download the checkpoint again")
    return content


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise AsftError(f"{index} has no weight_map; download the checkpoint again")
        # an index is no place for paths: a shard lies beside it
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise AsftError(f"{folder} lacks {len(missing)} of its {len(files)} shards, the first {missing[0]}")
        return files
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise AsftError(
            f"{folder} holds pickled weights (.bin or .pt), which can run code when read; expected {SINGLE_NAME}; "
            "convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise AsftError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; expected a safetensors checkpoint")


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise AsftError(f"{file} is no readable safetensors file ({error}); download it again") from error


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name` ("bfloat16", "float16", "float32").

    Raises:
        AsftError: any other name.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise AsftError(f"dtype is {name!r}; expected one of {', '.join(known)}")
    return known[name]
