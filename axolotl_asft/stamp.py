"""Writing on a saved adapter what it was trained under: `adapter_config.json` and the model card."""

import json
from pathlib import Path
from typing import Any

from axolotl_asft.files import atomic_write_text

STAMP_KEY = "asft"
CARD_BEGIN, CARD_END = "<!-- asft -->", "<!-- /asft -->"


def stamp_adapter(folder: str | Path, stamp: dict[str, Any]) -> bool:
    """Put `stamp` under the key "asft" of `folder`/adapter_config.json, where there is one.

    Loaders ignore the key (PEFT with a warning). Returns whether there was a file to stamp.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text(encoding="utf-8"))
    config[STAMP_KEY] = stamp
    atomic_write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return True


def stamp_model_card(folder: str | Path, stamp: dict[str, Any]) -> bool:
    """Put a short section about the constraint and the tag "asft" into `folder`/README.md, where there is one.

    A section written before is replaced. Returns whether there was a card to stamp.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return False
    from huggingface_hub import ModelCard

    card = ModelCard(_without_section(path.read_text(encoding="utf-8")), ignore_metadata_errors=True)
    tags = list(card.data.get("tags") or [])
    if "asft" not in tags:
        card.data["tags"] = [*tags, "asft"]
    atomic_write_text(path, str(card).rstrip() + "\n\n" + _section(stamp))
    return True


def _section(stamp: dict[str, Any]) -> str:
    measured = ""
    if stamp["update_norm"] is not None:
        measured = (
            f"- drift at the end: {stamp['drift']:.4f} (share of the update outside the alignment direction), "
            f"update norm {stamp['update_norm']:.4f}\n"
        )
    return (
        f"{CARD_BEGIN}\n## Safety constraint\n\n"
        "Trained with [axolotl-asft](https://pypi.org/project/axolotl-asft/) (AsFT, arXiv 2506.08473): the weight "
        "update was penalised for leaving the alignment direction of the base model.\n\n"
        f"- direction: `{stamp['direction']}`, sha256 `{stamp['direction_sha256']}`\n"
        f"- `lambda_reg`: {stamp['lambda_reg']:g}, `projector`: {stamp['projector']}, layers constrained: "
        f"{stamp['layers']}\n{measured}\n"
        "The constraint makes harmful drift less likely; it proves nothing. Evaluate the model before you rely on it.\n"
        f"{CARD_END}\n"
    )


def _without_section(text: str) -> str:
    begin, end = text.find(CARD_BEGIN), text.find(CARD_END)
    if begin < 0 or end < begin:
        return text
    return text[:begin] + text[end + len(CARD_END) :]
