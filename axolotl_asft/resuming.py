"""Going on from a checkpoint: what comes out is stamped as one run, so all of it has to be under one constraint."""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer

from axolotl_asft.errors import AsftError
from axolotl_asft.history import HISTORY_FILE, read_history
from axolotl_asft.stamp import read_stamp

# Of the constraint's settings those that say what the weights were trained under.
WHAT_HOLDS = (
    "direction_sha256", "lambda_reg", "projector", "rank", "metric", "max_drift", "anchor_weight", "lora_scaling",
    "modules",
)  # fmt: skip


def refuse_other_constraint(checkpoint: Path, settings: dict[str, Any]) -> None:
    """A checkpoint that was trained without the constraint, or under another, would pass for one under this.

    Args:
        checkpoint: the folder that the trainer goes on from.
        settings: of the constraint.

    Raises:
        AsftError: it is one.
    """
    before = read_stamp(checkpoint) or _history_of(checkpoint.parent)
    if not before:
        raise AsftError(
            f"{checkpoint} was trained without the constraint, and a run that goes on from it would pass for a "
            "constrained one; start anew: another output_dir, or neither resume_from_checkpoint nor "
            "auto_resume_from_checkpoints"
        )
    for key in WHAT_HOLDS:
        then, now = before.get(key), settings[key]
        if key not in before or then == now or (key == "direction_sha256" and None in (then, now)):
            continue
        raise AsftError(
            f"{checkpoint} was trained under {key} {then}, and this run asks for {now}; go on with the constraint of "
            "the checkpoint, or start anew in another output_dir"
        )


def refuse_resumed(trainer: Trainer, checkpoint: Path, settings: dict[str, Any]) -> None:
    """`refuse_other_constraint` by the main process, on whose disk stamp and history are, for all of them.

    Raises:
        AsftError: on every process, what the main one found.
    """
    found: list[str | None] = [None]
    if trainer.is_world_process_zero():
        try:
            refuse_other_constraint(checkpoint, settings)
        except AsftError as error:
            found = [str(error)]
    if trainer.args.world_size > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        raise AsftError(found[0])


def peak_before(checkpoint: Path, logged: list[dict[str, Any]]) -> float | None:
    """The penalty's peak up to a checkpoint: what its stamp says, and the lines of the log; None where neither does."""
    known = [read_stamp(checkpoint).get("penalty_peak"), *(line.get("asft/penalty") for line in logged)]
    return max((value for value in known if value is not None), default=None)


def _history_of(folder: Path) -> dict[str, Any]:
    """The constraint of the run in a folder: FSDP2 keeps checkpoints in pieces, without an adapter that is stamped."""
    if not (folder / HISTORY_FILE).is_file():
        return {}
    constraint = read_history(folder).header.get("constraint")
    return constraint if isinstance(constraint, dict) else {}
