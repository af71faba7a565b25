"""An axolotl config as it stands in its file: plain keys, nothing validated."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML.

    Raises:
        AsftError: no such file, no YAML, or no keys in it.
    """
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        raise AsftError(f"{path}{where} is no YAML ({str(error).splitlines()[0]}); mend it there") from error
    if not isinstance(content, dict):
        raise AsftError(f"{path} holds no keys; expected an axolotl config")
    return content


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        AsftError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AsftError(f"{path} cannot be read ({error.__class__.__name__}); give a text file") from error


def written_config(cfg: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keys of the YAML file, with the values that hold; of every key that is set, where there is no such file.

    axolotl fills hundreds of defaults in before a plugin sees the config. What a dict or list of the file became by
    that is left out too.

    Args:
        cfg: axolotl's config.
        arguments: of the command, whose options replace keys of the file.
    """
    everything = {key: value for key, value in cfg.items() if value is not None}
    try:
        written = read_config(Path(str(cfg.get("axolotl_config_path"))))
    except AsftError:
        return _plain(everything)
    given = {argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in arguments if argument[:1] == "-"}
    shown = {key: everything.get(key, value) for key, value in written.items()}
    shown |= {key: value for key, value in written.items() if isinstance(value, dict | list) and key != "asft"}
    return _plain(shown | {key: value for key, value in everything.items() if key in given})


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON values."""
    return json.loads(json.dumps({str(key): item for key, item in value.items()}, default=str))
