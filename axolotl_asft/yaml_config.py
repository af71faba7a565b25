"""An axolotl config as it stands in its file: plain keys, nothing validated."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError, one_line

# In a config, aliases written out: a stranger's few lines may stand for billions, or for more levels than Python goes.
MOST_VALUES, MOST_LEVELS = 100_000, 50


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML.

    Raises:
        AsftError: no such file, no YAML, no keys in it, or aliases in it that never end, or hardly.
    """
    import yaml

    text = read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:  # before anything is built, which writes merged keys (<<) out
            _refuse_endless(node, path)
            _refuse_repeated(node, path)
        content = None if node is None else loader.construct_document(node)
    except AsftError:
        raise
    except (ValueError, RecursionError) as error:  # a date of a 13th month, brackets a thousand deep
        raise AsftError(f"{path} cannot be read as YAML ({one_line(error)}); fix the file") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise AsftError(f"{path}{where} is not valid YAML ({problem}); fix the file") from error
    if not isinstance(content, dict):
        raise AsftError(f"{path} holds no keys; expected an axolotl config")
    return content


def refuse_repeated_keys(path: Path) -> None:
    """Refuse a config that gives plugins, asft, or a key of the asft block twice: YAML takes the last, without a word.

    Raises:
        AsftError: it does, with both lines.
    """
    import yaml

    text, node = read_text(path), None
    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):  # not for us to say
        node = yaml.compose(text, yaml.SafeLoader)
    _refuse_repeated(node, path)


def _refuse_repeated(node: Any, path: Path) -> None:
    for block, keys in _mappings(node):
        lines: dict[str, int] = {}
        for key, _ in block:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and (keys is None or name in keys):
                raise AsftError(
                    f"{path} has {name}: in line {lines[name]} and again in line {line}, and only the last would "
                    "count; make one of them"
                )
            lines[name] = line


def _mappings(node: Any) -> list[tuple[list, tuple[str, ...] | None]]:
    """The (key, value) nodes of a config and of its asft blocks, and which of the keys matter; None: all."""
    if not isinstance(getattr(node, "value", None), list) or not all(isinstance(pair, tuple) for pair in node.value):
        return []
    blocks = [value.value for key, value in node.value if key.value == "asft" and isinstance(value.value, list)]
    inside = [block for block in blocks if all(isinstance(pair, tuple) for pair in block)]
    return [(node.value, ("plugins", "asft")), *((block, None) for block in inside)]


def _refuse_endless(node: Any, path: Path) -> None:
    """Refuse YAML that never ends once its aliases are written out, or hardly."""
    values, levels = _written_out(node, {}, path)
    if values > MOST_VALUES or levels > MOST_LEVELS:
        raise AsftError(
            f"{path} expands to more than {MOST_VALUES:,} values, or more than {MOST_LEVELS} levels, once its aliases "
            "(*name) are resolved; expected an axolotl config, which has hundreds on a few levels; remove the aliases"
        )


def _written_out(node: Any, counted: dict[int, tuple[int, int] | None], path: Path) -> tuple[int, int]:
    """How many values and levels a node of YAML stands for; each node is looked at once.

    Args:
        counted: id of a node -> the result, None while it is being counted.

    Raises:
        AsftError: a node that stands in itself.
    """
    if id(node) in counted:
        known = counted[id(node)]
        if known is None:
            raise AsftError(
                f"{path}, line {node.start_mark.line + 1}: the value that begins here contains itself, through an "
                "alias (*name); expected a finite value; remove the alias"
            )
        return known
    counted[id(node)] = None
    values, levels = 1, 1
    for child in [] if isinstance(node.value, str) else node.value:
        for part in child if isinstance(child, tuple) else (child,):
            more, below = _written_out(part, counted, path)
            values, levels = values + more, max(levels, below + 1)
    counted[id(node)] = values, levels
    return values, levels


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        AsftError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise AsftError(f"{path} cannot be read: there is no file of that name; check the path") from error
    except IsADirectoryError as error:
        raise AsftError(f"{path} is a folder; expected a file; give one in it") from error
    except UnicodeDecodeError as error:
        raise AsftError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except OSError as error:
        raise AsftError(f"{path} cannot be read ({error.strerror}); give a text file") from error


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


def scalar(text: object) -> str:
    """A text as YAML writes it in a line, quoted where it has to be."""
    import yaml

    return yaml.safe_dump({"": str(text)}, width=10**6, allow_unicode=True).partition(": ")[2].strip()
