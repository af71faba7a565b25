"""An axolotl config as it stands in its file: plain keys, nothing validated."""

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
