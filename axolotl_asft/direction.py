"""The direction file: the alignment direction of a model, one small safetensors file."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import atomic_write, file_sha256, pinned_sha256, seen_from_here
from axolotl_asft.hub import direction_path
from axolotl_asft.penalty import projector_eigenvalues
from axolotl_asft.spec import FORMAT, FORMAT_VERSION, REMAKE, checked_spec, named

# How far U^T U may be from the identity: the rounding of a unit vector's entries, with room to spare.
ORTHONORMAL_WITHIN = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Wide types first, as safetensors itself lays them out, so that every tensor is aligned.
STORE_ORDER = {"F32": 0, "BF16": 1, "F16": 2}
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
ON_UNCOVERED = ("error", "warn", "ignore")  # where LoRA has a layer and the file no direction for it


@dataclass(frozen=True)
class Metric:
    """How the change of one layer is measured where not by ||dW||_F: as ||Y^T dW X||_F.

    Attributes:
        inputs: X (in, m).
        norm: () fp32, ||Y^T d X||_F over all of d.
        outputs: Y (out, n); None: the identity.
    """

    inputs: Tensor
    norm: Tensor
    outputs: Tensor | None = None

    def sees(self) -> bool:
        """Whether any change counts in it: one of zeros, or of no columns, holds nothing."""
        return bool(self.inputs.any() and (self.outputs is None or self.outputs.any()))


@dataclass(frozen=True)
class ModuleDirection:
    """The alignment direction of one linear layer, d (out x in), as d ~ U diag(S) V^T.

    Attributes:
        U: (out, k), leading left singular vectors, orthonormal columns.
        S: (k,) fp32, their singular values, descending.
        norm: () fp32, ||d||_F over all of d.
        in_features: number of columns of d.
        V: (in, k), right singular vectors, where the file keeps them.
        metrics: name in `spec.METRICS` -> its factors, where the file keeps them (see `axolotl_asft.metrics`).
    """

    U: Tensor
    S: Tensor
    norm: Tensor
    in_features: int
    V: Tensor | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.in_features

    def projector(self, kind: str, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """C = U diag(c) U^T from the `rank` leading directions: U (out, k), as stored, and c (k,), in fp32.

        Args:
            kind: "paper", "normalized" or "subspace" (`axolotl_asft.penalty.projector_eigenvalues`).
            rank: None: all that are stored, as under a rank that is larger.
        """
        return self.U[:, :rank], projector_eigenvalues(kind, self.S, self.norm)[:rank]

    def check_shape(self, name: str, shape: tuple[int, int], where: str) -> None:
        """Refuse a layer of another shape than d's.

        Args:
            name: of the layer.
            shape: (out, in) of the layer.
            where: "model" or "adapter".
        """
        if shape != self.shape:
            raise AsftError(
                f"{name} is {shape} (out, in) in the {where} and {self.shape} in the direction; use the direction of "
                f"this {where}"
            )


@dataclass(frozen=True)
class AlignmentDirection:
    """The alignment direction of a whole model: aligned weights minus base weights, layer by layer.

    Attributes:
        modules: full module name in the Hugging Face model -> its direction.
        spec: where it comes from and how it was made (docs: the direction file); JSON values.
        sha256: of the file it was loaded from; None before it is saved.
    """

    modules: Mapping[str, ModuleDirection]
    spec: Mapping[str, Any] = field(repr=False)
    sha256: str | None = None

    def save(self, path: str | Path) -> str:
        """Write one `.safetensors` file, atomically; returns its sha256.

        The same direction gives the same bytes.
        """
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": json.dumps(self.spec, sort_keys=True, allow_nan=False),
        }
        path = Path(path).expanduser()
        atomic_write(path, lambda temporary: _write(self.modules, temporary, metadata))
        return file_sha256(path)

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> "AlignmentDirection":
        """Read and verify a direction file.

        Args:
            path: the file, or on the Hugging Face Hub `owner/name[@revision][:file]` (`axolotl_asft.hub`).
            sha256: refuse a file with a different hash.

        Raises:
            AsftError: the file is missing, not a direction file, of another version or truncated, lacks a field or
                tensor, or has wrong shapes, non-finite numbers or columns of U that are not orthonormal.
        """
        path = direction_path(path)
        if not path.is_file():
            raise AsftError(
                f"no direction file at {path} ({seen_from_here()}); expected a .safetensors file, or owner/name on the "
                "Hub"
            )
        found = pinned_sha256(path, sha256, "direction_sha256")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                spec = checked_spec(path, file.metadata())
                present = set(file.keys())
                modules = {name: _checked_module(path, file, present, name, spec) for name in spec["modules"]}
                extra = present - {key for name in modules for key in _tensors(name, modules[name])}
        except (SafetensorError, OSError) as error:
            reason = named(one_line(error))
            raise AsftError(
                f"{path} is not a readable safetensors file ({reason}); expected a direction file; {REMAKE}"
            ) from error
        if extra:
            raise AsftError(f"{path} has a tensor {named(min(extra))} that its spec does not name; {REMAKE}")
        return cls(modules=modules, spec=spec, sha256=found)


def select_modules(names: list[str], patterns: list[str]) -> list[str]:
    """The names that one of the regular expressions matches somewhere, in order.

    Raises:
        AsftError: a pattern is no regular expression, or matches no name at all.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matching = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise AsftError(f"modules: {pattern!r} is not a regular expression ({error})") from error
        if not matching:
            raise AsftError(f"modules: {pattern!r} matches none of {len(names)} layers, the first {names[:1]}")
        chosen.update(matching)
    return [name for name in names if name in chosen]


def refuse_to_replace_weights(path: Path) -> None:
    """A direction replaces one that is there, and no other safetensors file: it may be a model's.

    Raises:
        AsftError: there is such a file.
    """
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            kind = (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return  # a damaged one
    if kind != FORMAT:
        raise AsftError(f"{path} holds other tensors, perhaps a model's, and is not replaced; give another --output")


def _write(modules: Mapping[str, ModuleDirection], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors with a sorted header, one module at a time: they may lie on disk, and memory holds one."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name in modules:
        for key, tensor in _tensors(name, modules[name]).items():
            entries[key] = {"dtype": STORED_AS[tensor.dtype], "shape": list(tensor.shape)}
    end = 0
    for key in sorted(set(entries) - {"__metadata__"}, key=lambda key: (STORE_ORDER[entries[key]["dtype"]], key)):
        size = math.prod(entries[key]["shape"]) * BYTES[entries[key]["dtype"]]
        entries[key]["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps(dict(sorted(entries.items())), separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in modules:
            for key, tensor in _tensors(name, modules[name]).items():
                file.seek(8 + len(text) + entries[key]["data_offsets"][0])
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _checked_module(path: Path, file: safe_open, present: set[str], name: str, spec: dict[str, Any]) -> ModuleDirection:
    entry = spec["modules"][name]
    (rows, columns), k = entry["shape"], entry["k"]

    def read(part: str, shape: tuple[int, ...]) -> Tensor:
        key = f"{name}.{part}"
        if key not in present:
            raise AsftError(f"{path} lacks the tensor {key}; {REMAKE}")
        view = file.get_slice(key)
        stored, dtype = tuple(view.get_shape()), view.get_dtype()
        if stored != shape:
            raise AsftError(f"{path}: {key} has shape {stored}; expected {shape} (its spec); {REMAKE}")
        if dtype not in STORE_ORDER:
            raise AsftError(f"{path}: {key} has dtype {dtype}; expected one of {', '.join(STORE_ORDER)}; {REMAKE}")
        tensor = file.get_tensor(key)
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():  # NaN comes through aminmax
            raise AsftError(f"{path}: {key} holds NaN or infinity; {REMAKE}")
        return tensor

    direction = ModuleDirection(
        U=read("U", (rows, k)),
        S=read("S", (k,)),
        norm=read("norm", ()),
        in_features=columns,
        V=read("V", (columns, k)) if f"{name}.V" in present else None,
        metrics={
            metric: Metric(
                inputs=read(f"{metric}.inputs", (columns, size["inputs"])),
                norm=read(f"{metric}.norm", ()),
                outputs=read(f"{metric}.outputs", (rows, size["outputs"])) if "outputs" in size else None,
            )
            for metric, size in entry.get("metrics", {}).items()
        },
    )
    _check_values(path, name, direction)
    return direction


def _check_values(path: Path, name: str, module: ModuleDirection) -> None:
    S, norm = module.S.double(), float(module.norm)
    if (S < 0).any() or (S[1:] > S[:-1]).any():
        raise AsftError(f"{path}: {name}.S is not descending and non-negative; {REMAKE}")
    if norm < 0 or float(torch.linalg.vector_norm(S)) > norm * (1 + 1e-4) + 1e-30:
        raise AsftError(f"{path}: {name}.norm is {norm:.6g}, less than the norm of its singular values; {REMAKE}")
    for metric, factors in module.metrics.items():
        if float(factors.norm) < 0:
            raise AsftError(f"{path}: {name}.{metric}.norm is negative; {REMAKE}")
    for part, vectors in (("U", module.U), ("V", module.V)):
        if vectors is None or vectors.shape[1] == 0:
            continue
        columns = vectors.float()
        gram = columns.T @ columns
        error = float((gram - torch.eye(vectors.shape[1])).abs().max())
        if error > ORTHONORMAL_WITHIN.get(vectors.dtype, 1e-4):
            raise AsftError(
                f"{path}: the columns of {name}.{part} are not orthonormal (off by {error:.2g}; expected under "
                f"{ORTHONORMAL_WITHIN.get(vectors.dtype, 1e-4):g}); {REMAKE}"
            )


def _tensors(name: str, module: ModuleDirection) -> dict[str, Tensor]:
    """The tensors of one module by their names in the file."""
    found = {"U": module.U, "S": module.S, "norm": module.norm}
    if module.V is not None:
        found["V"] = module.V
    for metric, factors in module.metrics.items():
        found |= {f"{metric}.inputs": factors.inputs, f"{metric}.norm": factors.norm}
        if factors.outputs is not None:
            found[f"{metric}.outputs"] = factors.outputs
    return {f"{name}.{part}": tensor for part, tensor in found.items()}
