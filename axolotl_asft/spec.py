"""The spec of a direction file: the JSON that says where it comes from and what is in it, checked before use."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError

FORMAT = "asft-direction"
FORMAT_VERSION = "1"
SPEC_FIELDS = ("base", "aligned", "rank", "svd", "modules", "tool", "created")
MODULE_FIELDS = ("shape", "k", "energy", "bound")
METRICS = ("activations", "fisher")  # that a file may hold
MOST_ANSWERS, MOST_TEXT = 512, 10_000  # characters
# Category Cc, which a terminal would obey, and lone surrogates (Cs), which none can be sent.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
REMAKE = "make it again with `axolotl asft extract`"


def checked_spec(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """The spec of a file from its header's metadata.

    Raises:
        AsftError: no direction file, another version, no JSON, a value that is missing or of another kind, or control
            characters in one that is printed.
    """
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise AsftError(
            f"{path} is not a direction file: its format is {metadata.get('format')!r}; expected {FORMAT!r}; {REMAKE}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise AsftError(
            f"{path} has format version {metadata.get('format_version')!r}; this axolotl-asft reads "
            f"{FORMAT_VERSION!r}; upgrade axolotl-asft, or {REMAKE}"
        )
    try:
        spec = json.loads(metadata.get("spec", ""))
    except (ValueError, RecursionError) as error:
        raise AsftError(f"{path}: its spec is not JSON ({error}); {REMAKE}") from error
    missing = [name for name in SPEC_FIELDS if not isinstance(spec, dict) or name not in spec]
    if missing:
        raise AsftError(f"{path}: its spec lacks {', '.join(missing)}; {REMAKE}")
    if fault := fault_of_texts(spec):
        raise AsftError(f"{path}: its spec has {fault}; {REMAKE}")
    modules = spec["modules"]
    if not isinstance(modules, dict) or not modules:
        raise AsftError(f"{path}: its spec names no modules; {REMAKE}")
    for name, entry in modules.items():
        lacking = [key for key in MODULE_FIELDS if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise AsftError(f"{path}: its spec for {named(name)} lacks {', '.join(lacking)}; {REMAKE}")
        _check_module_entry(path, name, entry)
    for side in ("base", "aligned"):
        model = spec[side]
        if not isinstance(model, dict) or not isinstance(model.get("id"), str):
            raise AsftError(f"{path}: its spec names no {side} model; {REMAKE}")
        if not all(isinstance(model.get(key), str | None) for key in ("revision", "sha256", "read_as")):
            raise AsftError(f"{path}: its spec has a value for the {side} model that is not text; {REMAKE}")
    texts = all(isinstance(spec[key], str) for key in ("tool", "created"))
    metrics = spec.get("metrics", {})
    blocks = [spec["rank"], spec["svd"], metrics, *(metrics.values() if isinstance(metrics, dict) else ())]
    if not texts or not all(isinstance(block, dict) for block in blocks):
        raise AsftError(f"{path}: its spec has a value of the wrong type; {REMAKE}")
    if not _is_number(spec.get("relative_norm", 0.0)):
        raise AsftError(f"{path}: its spec has relative_norm {shown(spec['relative_norm'])}; {REMAKE}")
    if fault := fault_of_own_answers(spec.get("own_answers", [])):
        raise AsftError(f"{path}: its spec has {fault}; {REMAKE}")
    return spec


def fault_of_texts(spec: dict[str, Any]) -> str | None:
    """What a spec's texts have that would be refused when the file is read; own answers have line breaks."""
    for text in _texts({key: value for key, value in spec.items() if key != "own_answers"}):
        if CONTROL.search(text):
            return f"control characters in {shown(text)}; expected text that can be printed"
    return None


def _texts(value: object) -> Iterator[str]:
    """Every string in a JSON value, however deep, keys too."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def own_answers_in(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the aligned model was asked and said itself, as (request, answer); nothing where the file keeps none."""
    return [(request, answer) for request, answer in spec.get("own_answers", [])]


def fault_of_own_answers(turns: object) -> str | None:
    """What is wrong with a spec's own answers, and what was expected."""
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        expected = f"pairs of a request and an answer, of {MOST_TEXT:,} characters at most"
        return f"own_answers {shown(turns)}; expected {expected}"
    if len(turns) > MOST_ANSWERS:
        return f"{len(turns):,} own_answers; expected {MOST_ANSWERS} at most"
    return None


def _is_turn(turn: object) -> bool:
    texts = turn if isinstance(turn, list) else []
    return len(texts) == 2 and all(isinstance(text, str) and len(text) <= MOST_TEXT for text in texts)


def _check_module_entry(path: Path, name: str, entry: dict[str, Any]) -> None:
    shape, k = entry["shape"], entry["k"]
    integers = isinstance(shape, list) and len(shape) == 2 and all(_is_count(side) and side > 0 for side in shape)
    if not integers or not _is_count(k) or k > min(shape):
        raise AsftError(
            f"{path}: its spec for {named(name)} has shape {shown(shape)} and k {shown(k)}; expected [out, in] and a "
            f"number; {REMAKE}"
        )
    metrics = entry.get("metrics", {})
    for metric, size in metrics.items() if isinstance(metrics, dict) else [("", metrics)]:
        counts = [size.get("inputs"), size.get("outputs", 0)] if isinstance(size, dict) else []
        if metric not in METRICS or not counts or not all(_is_count(count) for count in counts):
            raise AsftError(
                f"{path}: its spec for {named(name)} has the metric {shown(metric)} of {shown(size)}; expected one "
                f"of {', '.join(METRICS)} with its number of inputs; {REMAKE}"
            )
    for key in ("energy", "bound"):
        if not _is_number(entry[key]):
            raise AsftError(
                f"{path}: its spec for {named(name)} has {key} {shown(entry[key])}; expected a number; {REMAKE}"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not


def named(name: str) -> str:
    """A module's name as one short piece of a line, whatever is in it."""
    return repr(name)[1:-1][:200]


def shown(value: object) -> str:
    """A value from the file, cut to fit a line."""
    return reprlib.repr(value)
