"""Writing on a saved adapter what it was trained under: `adapter_config.json` and the model card."""

import json
from pathlib import Path
from typing import Any

from axolotl_asft.files import atomic_write_text, read_json, without_nan

STAMP_KEY = "asft"
PAGE = "asft_report.html"  # beside a model card, where the report was drawn
PICTURE = "asft_report_training.png"
# What a training measured of the adapter: keys of the stamp, and beginnings of the card's lines (`_measured`).
MEASURED = ("anchor_kl", "penalty_peak", "drift", "update_norm")
MEASURED_LINES = ("- drift at the end", "- divergence from", "- the numbers at the end", "![")


def stamp_adapter(folder: str | Path, stamp: dict[str, Any]) -> bool:
    """Put `stamp` under the key "asft" of `folder`/adapter_config.json, where there is one.

    Loaders ignore the key (PEFT with a warning). Returns whether there was a file to stamp.
    """
    return add_to_config(Path(folder) / "adapter_config.json", STAMP_KEY, stamp)


def read_stamp(folder: str | Path) -> dict[str, Any]:
    """What `stamp_adapter` wrote; empty where it did not."""
    path = Path(folder) / "adapter_config.json"
    found = read_json(path, "expected what PEFT saved").get(STAMP_KEY) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def remove_measurements(folder: str | Path) -> None:
    """Of what the adapter in `folder` was trained under, in its stamp and in its card, the settings stay."""
    if stamp := read_stamp(folder):
        stamp_adapter(folder, {key: value for key, value in stamp.items() if key not in MEASURED})
    card = Path(folder) / "README.md"
    if card.is_file():
        before, begin, rest = card.read_text(encoding="utf-8").partition(f"<!-- {STAMP_KEY} -->")
        section, end, after = rest.partition(f"<!-- /{STAMP_KEY} -->")
        if end:
            lines = [line for line in section.splitlines() if not line.startswith(MEASURED_LINES)]
            atomic_write_text(card, before + begin + "\n".join(lines).rstrip() + "\n" + end + after)


def stamp_model_card(folder: str | Path, stamp: dict[str, Any]) -> bool:
    """Put a short section about the constraint and the tag "asft" into `folder`/README.md, where there is one.

    A section written before is replaced; a picture of the training beside the card is shown in it. Returns whether
    there was a card to stamp.
    """
    section = _section(stamp)
    if (Path(folder) / PICTURE).is_file():
        section += f"\n![Loss, penalty and size of the update over the steps of the training]({PICTURE})\n"
    return add_to_model_card(Path(folder) / "README.md", section, STAMP_KEY, "asft")


def add_to_config(path: Path, key: str, value: dict[str, Any]) -> bool:
    """Set one key of a JSON file, where there is one; returns whether there was. What is not finite becomes null."""
    if not path.is_file():
        return False
    config = read_json(path, "expected what PEFT saved")
    config[key] = without_nan(value)
    atomic_write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return True


def add_to_model_card(path: Path, section: str, mark: str, tag: str) -> bool:
    """Put a section, in comments of the name `mark`, and a tag into a model card, where there is one.

    A section of that mark written before is replaced. Returns whether there was a card.
    """
    if not path.is_file():
        return False
    from huggingface_hub import ModelCard

    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    card = ModelCard(_without(path.read_text(encoding="utf-8"), begin, end), ignore_metadata_errors=True)
    tags = list(card.data.get("tags") or [])
    if tag not in tags:
        card.data["tags"] = [*tags, tag]
    atomic_write_text(path, f"{str(card).rstrip()}\n\n{begin}\n{section.rstrip()}\n{end}\n")
    return True


def _section(stamp: dict[str, Any]) -> str:
    budget = "" if stamp["max_drift"] is None else f"`max_drift`: {stamp['max_drift']:g}, "
    if stamp["anchor_weight"]:
        budget += f"`anchor_weight`: {stamp['anchor_weight']:g}, "
    return (
        "## Safety constraint\n\n"
        "Trained with [axolotl-asft](https://pypi.org/project/axolotl-asft/) (AsFT, arXiv 2506.08473): "
        f"{_what_was_held(stamp)}.\n\n"
        f"- direction: `{stamp['direction']}`, sha256 `{stamp['direction_sha256']}`\n"
        f"- `lambda_reg`: {stamp['lambda_reg']:g}, {budget}`projector`: {stamp['projector']}, `metric`: "
        f"{stamp['metric']}, layers constrained: {stamp['layers']}\n{_asked(stamp)}{_left_out(stamp)}"
        f"{_measured(stamp)}\n"
        "The constraint makes harmful drift less likely; it proves nothing. Evaluate the model before you rely on it.\n"
    )


def _what_was_held(stamp: dict[str, Any]) -> str:
    measured = {
        "weights": "for leaving the alignment direction of the base model",
        "activations": "for what it does to the layers' outputs on prompts that ask for harm",
        "fisher": "for what it does to the aligned model's own refusals",
    }
    held = []
    if stamp["lambda_reg"]:
        held.append(f"the weight update was penalised {measured[stamp['metric']]}")
    if stamp["max_drift"] is not None:
        held.append("every layer's update was kept within a budget")
    if stamp["anchor_weight"]:
        held.append("at every step the divergence from the aligned model's own answers was added to the loss")
    return ", and ".join(held) or "its numbers were logged, and nothing was constrained"


def _asked(stamp: dict[str, Any]) -> str:
    others = [f"as `` {json.dumps(text)} ``" for text in stamp.get("prompt_formats", [])]
    others += ["under general system prompts and in later turns"] if stamp.get("general_formats") else []
    return f"- asked in the chat template, {', '.join(others)}\n" if others else ""


def _left_out(stamp: dict[str, Any]) -> str:
    count = stamp.get("uncovered")
    return f"- trained without the constraint: {count} LoRA layers or other weights\n" if count else ""


def _measured(stamp: dict[str, Any]) -> str:
    if "interrupted_at" in stamp:
        step, steps = stamp["interrupted_at"]
        return f"- interrupted after {step} of {steps} steps: the training was not finished\n"
    numbers = [stamp[name] for name in ("drift", "update_norm", "anchor_kl") if name in stamp]
    if None in without_nan(numbers):
        return "- the numbers at the end are not finite: the training diverged; do not use this adapter\n"
    anchored = ""
    if stamp["anchor_weight"]:
        anchored = f"- divergence from the aligned model's own answers: {stamp['anchor_kl']:.4g} nats per token\n"
    return (
        f"{anchored}- drift at the end: {stamp['drift']:.4f} (share of the update outside the alignment direction), "
        f"update norm {stamp['update_norm']:.4f}\n"
    )


def _without(text: str, begin: str, end: str) -> str:
    first, last = text.find(begin), text.find(end)
    return text if first < 0 or last < first else text[:first] + text[last + len(end) :]
