"""The config of a run as its user wrote it, with what the command line changed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def written_config(cfg: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keys of the YAML file, with the values that hold; of every key that is set, where there is no such file.

    axolotl fills hundreds of defaults in before a plugin sees the config. What a dict or list of the file became by
    that is left out too.

    Args:
        cfg: axolotl's config.
        arguments: of the command, whose options replace keys of the file.
    """
    everything = {key: value for key, value in cfg.items() if value is not None}
    written = _read(cfg.get("axolotl_config_path"))
    if written is None:
        return _plain(everything)
    given = {argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in arguments if argument[:1] == "-"}
    shown = {key: everything.get(key, value) for key, value in written.items()}
    shown |= {key: value for key, value in written.items() if isinstance(value, dict | list) and key != "asft"}
    return _plain(shown | {key: value for key, value in everything.items() if key in given})


def _read(path: Any) -> dict[str, Any] | None:
    import yaml

    try:
        content = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON values."""
    return json.loads(json.dumps({str(key): item for key, item in value.items()}, default=str))
