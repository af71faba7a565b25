"""Is this direction for this model? Asked of the checkpoint's files before a run, and of the weights it loaded."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from axolotl_asft import fingerprint
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError


def verify_weights(
    direction: AlignmentDirection, weights: Iterable[tuple[str, Tensor, tuple[Tensor, Tensor] | None]]
) -> None:
    """Refuse a direction that was extracted for other weights than these, 4-bit and 8-bit ones included.

    Args:
        weights: module names, their loaded base weights (out, in), plain or of bitsandbytes, and what an
            initialisation took out of them, as A (r, in) and scaling B (out, r).

    Raises:
        AsftError: more than 0.25 % of the fingerprint's weights differ, or the file lacks them.
    """
    blocks = _fingerprint_blocks(direction)
    differing = compared = 0
    for name, weight, taken_out in weights:
        if name not in blocks:
            raise AsftError(f"the direction's fingerprint lacks {name}; make it again, or set verify_model: false")
        block = fingerprint.decode_block(blocks[name])
        if (found := fingerprint.mismatches(name, block, weight, taken_out)) is not None:
            differing += found
            compared += len(block)
    if not compared:
        raise AsftError(
            "the model's weights are not loaded yet, or quantised in a way that cannot be compared with the direction; "
            "attach the constraint after loading them, or set verify_model: false"
        )
    _refuse_mismatch(direction, differing, compared)


def verify_checkpoint(direction: AlignmentDirection, base_model: str) -> bool:
    """Refuse a direction for another model from the checkpoint's files, where `base_model` is a local folder.

    A model that cannot be read here (on the Hub, quantised, under other names) is left to `verify_weights`.
    Returns whether weights were compared.

    Raises:
        AsftError: layers of other shapes, or other weights.
    """
    if not Path(base_model).expanduser().is_dir():
        return False
    try:
        checkpoint = Checkpoint.open(base_model)
    except AsftError:
        return False
    blocks = _fingerprint_blocks(direction)
    shapes = checkpoint.linear_weights()
    differing = compared = 0
    for name, module in direction.modules.items():
        if name not in shapes or name not in blocks:
            continue
        if shapes[name] != module.shape:
            raise AsftError(
                f"{name} is {shapes[name]} (out, in) in {base_model} and {module.shape} in the direction; use the "
                "direction of this model"
            )
        block = fingerprint.decode_block(blocks[name])
        start = fingerprint.block_start(name, shapes[name][0] * shapes[name][1])
        stored = checkpoint.values(name, start, len(block))
        if not stored.is_floating_point() or stored.element_size() == 1:
            continue  # quantised
        differing += fingerprint.mismatching_values(block, stored)
        compared += len(block)
    _refuse_mismatch(direction, differing, compared)
    return compared > 0


def _fingerprint_blocks(direction: AlignmentDirection) -> dict[str, str]:
    kept = direction.spec["aligned"].get("fingerprint")
    if not isinstance(kept, dict) or not isinstance(kept.get("blocks"), dict):
        raise AsftError("the direction file has no fingerprint of its model; make it again, or set verify_model: false")
    if kept.get("scheme") != fingerprint.SCHEME:
        raise AsftError(
            f"the direction's fingerprint is of scheme {kept.get('scheme')!r}; expected {fingerprint.SCHEME!r}; "
            "upgrade axolotl-asft, or set verify_model: false"
        )
    return kept["blocks"]


def _refuse_mismatch(direction: AlignmentDirection, differing: int, compared: int) -> None:
    if differing > fingerprint.MAX_MISMATCH * compared:
        raise AsftError(
            f"this direction was extracted for another model: {differing} of {compared} sampled weights of the "
            f"training model differ from {direction.spec['aligned']['id']}; base_model has to be the aligned model "
            f"of the direction (not its base {direction.spec['base']['id']}); use the matching direction"
        )
