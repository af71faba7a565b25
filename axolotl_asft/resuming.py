"""Going on from a checkpoint: what comes out is stamped as one run, so all of it has to be under one constraint."""

import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer

from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text, read_json
from axolotl_asft.stamp import read_stamp

STAMP_FILE = "asft_constraint.json"  # in a checkpoint without an adapter_config.json
# Of the constraint's settings those that say what the weights were trained under.
WHAT_HOLDS = (
    "direction_sha256", "lambda_reg", "projector", "rank", "metric", "max_drift", "anchor_weight",
    "prompt_formats", "general_formats", "lora_scaling", "modules",
)  # fmt: skip
# What it means that a stamp lacks a key: it is of a version without.
ABSENT: dict[str, Any] = {"prompt_formats": [], "general_formats": False}


def refuse_other_constraint(checkpoint: Path, settings: dict[str, Any]) -> None:
    """A checkpoint that was trained without the constraint, or under another, would pass for one under this.

    Args:
        checkpoint: the folder that the trainer goes on from.
        settings: of the constraint; what is not known of them yet may be missing.

    Raises:
        AsftError: it is one.
    """
    before, asked = _stamp_of(checkpoint), json.loads(json.dumps(settings, default=list))
    if not before:
        raise AsftError(
            f"{checkpoint} was trained without the constraint, and a run that continues from it would pass for a "
            "constrained one; start anew: another output_dir, or neither resume_from_checkpoint nor "
            "auto_resume_from_checkpoints"
        )
    before = ABSENT | before
    for key in WHAT_HOLDS:
        then, now = before.get(key), asked.get(key)
        if key not in before or key not in asked or then == now or (key == "direction_sha256" and None in (then, now)):
            continue
        raise AsftError(
            f"{checkpoint} was trained under {key} {then}, and this run asks for {now}; continue with the checkpoint's "
            "constraint, or start anew in another output_dir"
        )


def refuse_resumed(trainer: Trainer, checkpoint: Path, settings: dict[str, Any]) -> None:
    """`refuse_other_constraint` by the main process, on whose disk the stamp is, for all of them.

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


def formats_before(checkpoint: str | None) -> list[str] | None:
    """The prompt formats under which a checkpoint was trained; None where there is none, or it does not say."""
    return None if checkpoint is None else _stamp_of(Path(checkpoint)).get("prompt_formats")


def peak_before(checkpoint: Path, logged: list[dict[str, Any]]) -> float | None:
    """The penalty's peak up to a checkpoint: what its stamp says, and the lines of the log; None where neither does."""
    known = [_stamp_of(checkpoint).get("penalty_peak"), *(line.get("asft/penalty") for line in logged)]
    return max((value for value in known if value is not None), default=None)


def last_checkpoint(trainer: Trainer) -> Path:
    """Where transformers keeps one of this step."""
    return Path(trainer.args.output_dir or ".") / f"checkpoint-{trainer.state.global_step}"


def mark_checkpoint(trainer: Trainer, stamp: dict[str, Any]) -> None:
    """Leave in a new checkpoint what it was trained under, where it has no adapter that says so: FSDP2's, in pieces."""
    checkpoint = last_checkpoint(trainer)
    if trainer.is_world_process_zero() and checkpoint.is_dir() and not read_stamp(checkpoint):
        atomic_write_text(checkpoint / STAMP_FILE, json.dumps(stamp, indent=1, default=list) + "\n")


def _stamp_of(checkpoint: Path) -> dict[str, Any]:
    found = read_stamp(checkpoint)
    if not found and (checkpoint / STAMP_FILE).is_file():
        found = read_json(checkpoint / STAMP_FILE, "continue from another checkpoint")
    return found
