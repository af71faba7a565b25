"""The shipped configs: ordinary axolotl YAMLs, to be listed, read and copied."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.args import parse_block
from axolotl_asft.errors import AsftError, did_you_mean
from axolotl_asft.files import atomic_write_text, pinned_sha256, refuse_to_replace_file, seen_from_here
from axolotl_asft.hub import hub_file
from axolotl_asft.yaml_config import read_config, read_text, scalar


@dataclass(frozen=True)
class Recipe:
    """One shipped config.

    Attributes:
        name: of its file, without the ending.
        title: the first line of its comment.
        path: the file.
    """

    name: str
    title: str
    path: Path

    @property
    def text(self) -> str:
        """The whole YAML, comments included."""
        return read_text(self.path)

    def as_dict(self) -> dict[str, Any]:
        """What `axolotl asft recipes list --json` prints of it."""
        config = read_config(self.path)
        return {
            "name": self.name,
            "title": self.title,
            "base_model": config["base_model"],
            "direction": config["asft"]["direction"],
            "rl": config.get("rl"),
        }


def recipes() -> list[Recipe]:
    """All of them, by name.

    Raises:
        AsftError: the installation lacks them.
    """
    here = Path(__file__).parent
    # in the wheel inside the package, in a clone beside it
    folder = next((path for path in (here / "example_configs", here.parent / "example_configs") if path.is_dir()), None)
    if folder is None:
        raise AsftError("the installation lacks its example configs; repair it: pip install -U axolotl-asft")
    return [Recipe(path.stem, _title(path), path) for path in sorted(folder.glob("*.yml"))]


def recipe(name: str) -> Recipe:
    """The recipe of a name, with or without `.yml`.

    Raises:
        AsftError: there is none; the line names the nearest.
    """
    known = {found.name: found for found in recipes()}
    wanted = name.removesuffix(".yml")
    if wanted not in known:
        if within := [found for found in known if wanted and wanted.lower() in found]:
            hint = f"expected one of {', '.join(within)}"
        else:
            hint = did_you_mean(wanted, known, "`axolotl asft recipes list` shows them", cutoff=0.4)
        raise AsftError(f"there is no recipe {name!r}; {hint}")
    return known[wanted]


def copy_recipe(
    name: str, output: Path, direction: str | None = None, sha256: str | None = None, force: bool = False
) -> None:
    """Write a recipe to a file of one's own, under its name, with another direction in it where one is given.

    Raises:
        AsftError: no such recipe, a file that is there already, or a hash that is none.
    """
    refuse_to_replace_file(output, force)
    if output.suffix not in (".yml", ".yaml"):
        raise AsftError(f"--output is {output}; expected a name that ends in .yml")
    if sha256 is not None and direction is None:
        raise AsftError("--sha256 pins the file of --direction; give that too")
    if sha256 is not None and direction is not None and hub_file(direction) is None:
        file = Path(direction).expanduser()
        if file.is_file():
            pinned_sha256(file, sha256, "--sha256")
    found = recipe(name)
    text = found.text.replace(found.path.name, shlex.quote(output.name))
    if direction is not None:
        text = _with_its_making(with_direction(text, direction, sha256), direction)
    atomic_write_text(output, text)


def missing_direction(direction: str | None) -> str | None:
    """What to say of a direction that is a file on this machine, and is not there yet; None of any other."""
    if direction is None or hub_file(direction) is not None or Path(direction).expanduser().exists():
        return None
    return f"there is no file {direction} yet ({seen_from_here()})"


def with_direction(text: str, direction: str, sha256: str | None = None) -> str:
    """A config's text with another direction in its `asft:` block; comments and all else stay.

    Raises:
        AsftError: the hash is none, or the direction cannot be written in a line.
    """
    parse_block({"direction": direction, "direction_sha256": sha256})
    if direction.splitlines() != [direction]:
        raise AsftError(f"--direction is {direction!r}; expected one line: a path, or owner/name@revision")
    lines, inside, done = [], False, False
    for line in text.splitlines():
        if re.match(r"\S", line) and not line.startswith("#"):
            inside = line.startswith("asft:")
        key = re.match(r"(\s+)(direction|direction_sha256):", line) if inside else None
        if key is None:
            lines.append(line)
        elif key[2] == "direction":
            lines.append(f"{key[1]}direction: {scalar(direction)}")
            lines += [f"{key[1]}direction_sha256: {sha256.lower()}"] if sha256 else []
            done = True
    assert done, "a recipe has an asft block with a direction; a test holds it"
    return "\n".join(lines) + "\n"


def _with_its_making(text: str, direction: str) -> str:
    """A recipe's text whose head says which direction it reads; where that is a file here, how to make that one."""
    if hub_file(direction) is None:
        text = re.sub(r"-o \S+\.safetensors$", lambda _: f"-o {shlex.quote(direction)}", text, count=1, flags=re.M)
    lead = f"# The direction of this copy: {direction}\n# How to make one"
    return text.replace("# Make the direction once", lead, 1)


def _title(path: Path) -> str:
    return read_text(path).partition("\n")[0].removeprefix("#").strip()
