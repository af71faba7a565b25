"""What can be known of a run before its model is loaded."""

from axolotl_asft import fingerprint
from axolotl_asft.adapter import fingerprint_blocks, refuse_mismatch
from axolotl_asft.checkpoint import Checkpoint
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError


def check_base_model(direction: AlignmentDirection, base_model: str) -> None:
    """Refuse a direction for another model, from the checkpoint's files where `base_model` is a local folder.

    A model that cannot be read here (on the Hub, quantised, under other names) is left to the check of the
    loaded weights.

    Raises:
        AsftError: layers of other shapes, or other weights.
    """
    try:
        checkpoint = Checkpoint.open(base_model)
    except AsftError:
        return
    blocks = fingerprint_blocks(direction)
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
        differing += fingerprint.mismatching_values(block, checkpoint.values(name, start, len(block)))
        compared += len(block)
    refuse_mismatch(direction, differing, compared)
