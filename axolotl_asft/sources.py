"""What a direction is made from: two checkpoints, or one and the LoRA adapter that lies between them."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from axolotl_asft import fingerprint
from axolotl_asft.checkpoint import DECODER_LAYER, Checkpoint
from axolotl_asft.direction import select_modules
from axolotl_asft.errors import AsftError
from axolotl_asft.files import file_sha256
from axolotl_asft.hub import hub_model, model_folder, named_on_the_hub
from axolotl_asft.subspace import ROWS_AT_ONCE, LowRank

Weights = Mapping[str, Tensor]  # "base" or "aligned" -> (out, in), as stored


class Source(Protocol):
    """A base and an aligned model, of which one may be known only by its difference from the other.

    Attributes:
        names: of the modules, as the aligned model calls them.
        checkpoints: "base", "aligned" or both -> what is read.
        stored_names: of each of these, module -> what it is called there.
        entries: of the spec: "base", "aligned", and "adapter" where there is one.
    """

    names: list[str]
    checkpoints: dict[str, Checkpoint]
    stored_names: dict[str, dict[str, str]]
    entries: dict[str, dict[str, Any]]

    def difference(self, name: str, weights: Weights, device: str) -> Tensor | LowRank:
        """d of one module, fp32 on `device`; the only trip of its weights there."""

    def block(self, name: str, weights: Weights) -> str:
        """The fingerprint of the aligned weight."""

    def squared_norm(self, name: str, weights: Weights) -> float:
        """||W_aligned||_F^2."""


def open_source(
    base: str | Path | None, aligned: str | Path | None, adapter: str | Path | None, patterns: list[str] | None
) -> Source:
    """The source that was asked for.

    Raises:
        AsftError: not two of the three, a checkpoint or an adapter that cannot be read, or a pair that is none.
    """
    if adapter is None:
        if base is None or aligned is None:
            given = "only the base" if aligned is None else "only the aligned model"
            raise AsftError(f"{given} is given; expected base and aligned, or one of them and the adapter between them")
        return CheckpointPair(Checkpoint.open(base), Checkpoint.open(aligned), patterns)
    if (base is None) == (aligned is None):
        raise AsftError(
            "an adapter is the difference itself; give it with the aligned model that it was merged into, or with the "
            f"base that it was trained on, not {'both' if base is not None else 'alone'}"
        )
    side, location = ("base", base) if base is not None else ("aligned", aligned)
    assert location is not None
    return AdapterPair(side, Checkpoint.open(location), adapter, patterns)


class CheckpointPair:
    """d = W_aligned - W_base, subtracted in fp32."""

    def __init__(self, base: Checkpoint, aligned: Checkpoint, patterns: list[str] | None) -> None:
        """Match modules by whole name; a wrapper's prefix (`model.language_model.`) may stand before all of them.

        Raises:
            AsftError: a module of the aligned model that the base lacks, or has in another shape.
        """
        self.names = _linear_modules(aligned, patterns)
        self.checkpoints = {"base": base, "aligned": aligned}
        base_names = _counterparts(self.names, base, aligned)
        self.stored_names = {"base": base_names, "aligned": {name: name for name in self.names}}
        base_shapes, aligned_shapes = base.linear_weights(), aligned.linear_weights()
        for name in self.names:
            if base_shapes[base_names[name]] != aligned_shapes[name]:
                raise AsftError(
                    f"{name} is {aligned_shapes[name]} in {aligned.name} and {base_shapes[base_names[name]]} in "
                    f"{base.name}; expected a base and an aligned model of one architecture"
                )
        self.entries = {
            side: _model_entry(self.checkpoints[side], self.stored_names[side]) for side in self.checkpoints
        }

    def difference(self, name: str, weights: Weights, device: str) -> Tensor:
        difference = _sent(weights["aligned"], device).to(torch.float32, copy=True)
        base = _sent(weights["base"], device)
        for part, base_part in zip(difference.split(ROWS_AT_ONCE), base.split(ROWS_AT_ONCE), strict=True):
            part -= base_part.float()
        if not torch.isfinite(torch.stack(torch.aminmax(difference))).all():
            raise AsftError(f"{name}: the difference holds NaN or infinity; check both checkpoints' weights")
        return difference

    def block(self, name: str, weights: Weights) -> str:
        return fingerprint.encode_block(name, weights["aligned"])

    def squared_norm(self, name: str, weights: Weights) -> float:
        return _squared_norm(weights["aligned"])


class AdapterPair:
    """d = scaling B A of a LoRA adapter, whatever the weights: exact, and never multiplied out.

    The weights that are read say which model the direction is for, and how large d is beside them. With the aligned
    model they are its own. With the base, the aligned model is the base plus d, summed in fp32 as PEFT and axolotl
    merge: the model that training loads has to be merged so.
    """

    def __init__(self, side: str, checkpoint: Checkpoint, adapter: str | Path, patterns: list[str] | None) -> None:
        """
        Args:
            side: which model the checkpoint is, "base" or "aligned".
            adapter: a folder that PEFT saved, or owner/name[@revision] on the Hub.
            patterns: of modules; those that the adapter leaves alone have a difference of zero.
        """
        from axolotl_asft.saved import ADAPTER_WEIGHTS, SCALED_BY, SavedAdapter, check_base, check_merged

        saved = SavedAdapter.read(model_folder(adapter))
        self.names = _linear_modules(checkpoint, patterns)
        self.checkpoints = {side: checkpoint}
        self.stored_names = {side: {name: name for name in self.names}}
        self._side, self._factors = side, _checked_factors(saved, checkpoint)
        (check_merged if side == "aligned" else check_base)(saved, checkpoint, self._factors)
        name = saved.folder.resolve().name if hub_model(adapter) is None else str(adapter)
        of_base = _name_of(saved.config.get("base_model_name_or_path"))
        known = _model_entry(checkpoint, self.stored_names[side])
        unread = {"revision": None, "sha256": None, "read_as": f"not read: the adapter {name} is the difference"}
        other = {"id": of_base if side == "aligned" else f"{checkpoint.name} + {name}", **unread}
        scaled_by = {key: saved.config.get(key) for key in SCALED_BY}  # with the ranks, which are in the weights
        sha256 = file_sha256(saved.folder / ADAPTER_WEIGHTS)
        self.entries = {
            "base": known if side == "base" else other,
            "aligned": known if side == "aligned" else other,
            "adapter": {"id": name, "sha256": sha256, "layers": len(self._factors), **scaled_by},
        }

    def difference(self, name: str, weights: Weights, device: str) -> LowRank:
        factors = self._low_rank(name, weights[self._side].shape)
        if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
            raise AsftError(f"{name}: the adapter holds NaN or infinity; train it again")
        return LowRank(factors.B.to(device), factors.A.to(device))

    def block(self, name: str, weights: Weights) -> str:
        weight, factors = weights[self._side], self._low_rank(name, weights[self._side].shape)
        added = (factors.A, factors.B) if self._side == "base" else None
        return fingerprint.encode_block(name, weight, added)

    def squared_norm(self, name: str, weights: Weights) -> float:
        weight, factors = weights[self._side], self._low_rank(name, weights[self._side].shape)
        if self._side == "aligned":
            return _squared_norm(weight)
        parts = zip(weight.split(ROWS_AT_ONCE), factors.B.split(ROWS_AT_ONCE), strict=True)
        inner = sum(float(((B.T @ part.float()) * factors.A).sum(dtype=torch.float64)) for part, B in parts)
        gram = (factors.B.double().T @ factors.B.double()) * (factors.A.double() @ factors.A.double().T)
        return _squared_norm(weight) + 2 * inner + float(gram.sum())

    def _low_rank(self, name: str, shape: torch.Size) -> LowRank:
        if name not in self._factors:
            return LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        return self._factors[name]


def _sent(weight: Tensor, device: str) -> Tensor:
    """A weight in its stored dtype on a device: the one trip that it makes there, from pinned memory."""
    if device.startswith("cuda"):
        return weight.contiguous().pin_memory().to(device, non_blocking=True)
    return weight


def _squared_norm(weight: Tensor) -> float:
    """||W||_F^2 in float64, without a copy of W."""
    return sum(float(part.float().square().sum(dtype=torch.float64)) for part in weight.split(ROWS_AT_ONCE))


def _linear_modules(checkpoint: Checkpoint, patterns: list[str] | None) -> list[str]:
    names = sorted(checkpoint.linear_weights(), key=_natural_order)
    if not names:
        raise AsftError(
            f"{checkpoint.location} has no linear weights in numbered decoder layers; its tensors have names like "
            f"{next(iter(checkpoint.tensors), 'nothing')}"
        )
    return select_modules(names, patterns) if patterns else names


def _natural_order(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))


def _counterparts(names: list[str], base: Checkpoint, aligned: Checkpoint) -> dict[str, str]:
    """Module of the aligned model -> what the base calls it: the same, or the same under another prefix."""
    in_base = base.linear_weights()
    found = {name: name for name in names if name in in_base}
    missing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name not in found:
            missing[_split(name)[0]].append(name)
    taken = {_split(name)[0] for name in found}
    free = {_split(name)[0] for name in in_base} - taken
    for prefix, group in list(missing.items()):
        fitting = [other for other in sorted(free) if all(_joined(other, name) in in_base for name in group)]
        if len(fitting) == 1:
            found |= {name: _joined(fitting[0], name) for name in missing.pop(prefix)}
    lacking = [name for group in missing.values() for name in group]
    if lacking:
        raise AsftError(
            f"{len(lacking)} of {len(names)} layers of {aligned.name} are not in {base.name}, the first "
            f"{lacking[0]}{_in_its_place(lacking[0], base, aligned)}; expected a base and an aligned model of one "
            "architecture, or modules (--modules) that both have"
        )
    return found


def _split(name: str) -> tuple[str, str]:
    """`model.language_model.layers.0.mlp.up_proj` -> `model.language_model`, `layers.0.mlp.up_proj`."""
    match = DECODER_LAYER.search(name)
    assert match is not None  # of linear_weights
    return name[: match.start()], name[match.start() :].removeprefix(".")


def _joined(prefix: str, name: str) -> str:
    rest = _split(name)[1]
    return f"{prefix}.{rest}" if prefix else rest


def _in_its_place(name: str, base: Checkpoint, aligned: Checkpoint) -> str:
    """What the base has in the same block of the same layer, where it fuses or splits weights in another way."""
    match = DECODER_LAYER.search(name)
    assert match is not None
    part = name[: match.end()] + name[match.end() :].partition(".")[0]  # model.layers.0.self_attn
    inside = [key.removesuffix(".weight") for key in base.tensors if key.startswith(f"{part}.")]
    others = [key for key in inside if f"{key}.weight" not in aligned.tensors and not key.endswith(".bias")]
    if not others:
        return ""
    return (
        f"; it has {', '.join(others[:3])} there: weights that are fused in one and split in the other do not pair, so "
        "load and save both with one version of transformers"
    )


def _model_entry(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    dtypes = sorted({checkpoint.tensors[f"{name}.weight"].dtype for name in names.values()})
    return {"id": checkpoint.name, "revision": checkpoint.revision, "read_as": "safetensors " + ", ".join(dtypes)}


def _checked_factors(saved: Any, checkpoint: Checkpoint) -> dict[str, LowRank]:
    """The adapter's factors by module, scaling in B; refused where they are not all of the difference."""
    from axolotl_asft.saved import A_SUFFIX, B_SUFFIX, PREFIX

    shapes = checkpoint.linear_weights()
    whole = [
        key for key in saved.tensors if DECODER_LAYER.search(key) and not key.endswith((A_SUFFIX, B_SUFFIX, ".bias"))
    ]
    if whole:
        raise AsftError(
            f"{saved.folder} also changes {whole[0].removeprefix(PREFIX)}, which is neither A nor B; give the base and "
            "the merged model instead, without the adapter"
        )
    factors = {}
    for layer in saved.layers():
        if layer.name not in shapes:
            if DECODER_LAYER.search(layer.name) is None:
                continue  # a head, say: no linear layer of the decoder
            raise AsftError(
                f"{saved.folder} has the layer {layer.name}, which is not in {checkpoint.name}; expected the adapter's "
                "own model"
            )
        shape = (layer.B.shape[0], layer.A.shape[1])
        if shape != shapes[layer.name]:
            raise AsftError(
                f"{layer.name} is {shape} (out, in) in {saved.folder} and {shapes[layer.name]} in {checkpoint.name}; "
                "expected the adapter's own model"
            )
        factors[layer.name] = LowRank(layer.scaling * layer.B.float(), layer.A.float())
    if not factors:
        raise AsftError(f"{saved.folder} has no LoRA layers of linear layers of the decoder; there is no difference")
    return factors


def _name_of(location: object) -> str:
    """How a model is called in a direction file: never by its whole path."""
    text = str(location or "unknown")
    wanted = named_on_the_hub(text)
    return Path(text).name if wanted is None or wanted.file is not None else text
