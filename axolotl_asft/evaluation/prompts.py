"""Sets of prompts: the shipped ones, a file, or a dataset of the Hugging Face Hub; and chats from a file."""

import csv
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import json_object, json_value
from axolotl_asft.yaml_config import read_text

DATA = Path(__file__).parent / "data"
SHIPPED = ("harmful", "borderline")
SPLITS = ("heldout", "train", "all")
ENCODING = "utf-8-sig"  # with or without the mark that Excel puts first
# How the field's sets call the column, in the order of preference.
COLUMNS = ("prompt", "goal", "behavior", "question", "instruction", "forbidden_prompt", "text", "messages")
FILES = (".jsonl", ".json", ".csv", ".txt")
INSTEAD = "give a file of prompts"


@dataclass(frozen=True)
class Prompt:
    """One request to a model.

    Attributes:
        prompt: the text.
        category: what kind of request, "" where the set does not say.
        id: where it stands in its set.
    """

    prompt: str
    category: str = ""
    id: str = ""


def load_prompts(source: str, split: str = "heldout", limit: int | None = None) -> list[Prompt]:
    """The distinct prompts of a set, in its order.

    Args:
        source: "harmful" or "borderline", which ship with this package; a file (.jsonl, .json with a list, .csv, or
            .txt with one prompt a line), with `?column=NAME` behind it where its column is called otherwise; or a
            dataset of the Hub as `owner/name`, with what it needs behind a question mark:
            `PKU-Alignment/BeaverTails?split=30k_test`, `walledai/XSTest?label=safe`. There `config`, `split`,
            `revision` and `column` have their usual meaning; any other key keeps the rows with that value.
        split: "heldout", "train" or "all" of a shipped set; other sets have no such split.
        limit: at most so many, the same ones every time.

    Raises:
        AsftError: no such set or file, an unknown split, no column that looks like prompts, or what is none in it.
    """
    if split not in SPLITS:
        raise AsftError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if source in SHIPPED:
        rows = [row for row in _jsonl(DATA / f"{source}.jsonl") if split in ("all", row["split"])]
        prompts = [Prompt(row["prompt"], row["category"], row["id"]) for row in rows]
    elif (named := _named_file(source)) is not None:
        prompts = _prompts(_read_file(Path(named[0]).expanduser()), *named)
    else:
        prompts = _from_hub(source)
    distinct = list({prompt.prompt: prompt for prompt in prompts}.values())
    if not distinct:
        raise AsftError(f"{source} holds no prompts")
    if limit is not None and limit < len(distinct):
        chosen = sorted(random.Random(0).sample(range(len(distinct)), limit))
        distinct = [distinct[i] for i in chosen]
    return distinct


def load_chats(path: Path) -> list[tuple[str, str]]:
    """The first question and answer of each line's `messages`, of a JSONL file.

    Raises:
        AsftError: the file cannot be read, holds no chats, or a line of it is none.
    """
    turns = []
    for number, line in _lines(path):
        place, expected = f"{path}, line {number}", 'expected {"messages": [user, assistant]}'
        try:
            messages = json_object(line, place, expected)["messages"]
            said = [next(turn["content"] for turn in messages if turn["role"] == who) for who in ("user", "assistant")]
        except (KeyError, TypeError, StopIteration) as error:
            raise AsftError(f"{place}: {expected}") from error
        if other := [text for text in said if not isinstance(text, str)]:
            raise AsftError(f"{place}: the content of a message is {_shortly(other[0])}; expected a string")
        turns.append((said[0], said[1]))
    if not turns:
        raise AsftError(f"{path} holds no chats; expected one JSON object per line")
    return turns


def _named_file(source: str) -> tuple[str, str | None] | None:
    """The file that a set is in, and the column that is asked for; None of a dataset of the Hub."""
    if Path(source).expanduser().is_file():  # also one with a ? in its name
        return source, None
    name, mark, query = source.partition("?")
    path = Path(name).expanduser()
    if not path.is_file() and path.suffix.lower() not in FILES:
        return None
    options = dict(parse_qsl(query))
    if mark and (list(options) != ["column"] or path.suffix.lower() == ".txt"):
        raise AsftError(
            f"{name} is named as a file, with ?{query} after it; expected ?column=NAME, or nothing after a .txt file"
        )
    return name, options.get("column")


def _read_file(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        raise AsftError(f"{path} is a folder; expected a file of prompts, {', '.join(FILES)}")
    if not path.is_file():
        raise AsftError(f"there is no file {path}; check the path")
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return _jsonl(path)
        if suffix == ".json":
            content = json_value(path.read_text(encoding=ENCODING), path, INSTEAD)
            if not isinstance(content, list):
                raise ValueError(f"expected a list of strings or objects, found {_shortly(content)}")
            return [row if isinstance(row, dict) else {"prompt": row} for row in content]
        if suffix == ".csv":
            with path.open(encoding=ENCODING, newline="") as file:
                return list(csv.DictReader(file))
        if suffix == ".txt":
            return [{"prompt": line} for _, line in _lines(path)]
    except AsftError:
        raise
    except (ValueError, OSError, TypeError, csv.Error) as error:
        raise AsftError(f"{path} cannot be read as {path.suffix} ({error}); {INSTEAD}") from error
    raise AsftError(f"{path} ends in {path.suffix!r}; expected {', '.join(FILES)}")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json_object(line, f"{path}, line {number}", INSTEAD) for number, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines with something in them, each with its number in the file; the first without Excel's mark.

    Not `splitlines`, which also cuts at characters that JSON allows inside a string, such as U+2028.
    """
    lines = read_text(path).removeprefix("\ufeff").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _from_hub(source: str) -> list[Prompt]:
    name, _, query = source.partition("?")
    if name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
        raise AsftError(
            f"no prompts at {source}; expected {' or '.join(SHIPPED)}, a file, or a dataset of the Hub as owner/name"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    config, revision, column = (options.pop(key, None) for key in ("config", "revision", "column"))
    wanted_split = options.pop("split", None)
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=wanted_split, revision=revision)
    except Exception as error:  # datasets raises many kinds, from the network up to its parsers
        raise AsftError(
            f"the dataset {name} cannot be loaded ({one_line(error)}); check that the id is right, that you "
            "have access to it (hf auth login), and that ?config= and ?split= name parts of it"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if len(found) != 1:
            raise AsftError(f"{name} has the splits {', '.join(found)}; choose one with {name}?split=...")
        found = next(iter(found.values()))
    rows = [dict(row) for row in found]
    for key, value in options.items():
        if rows and key not in rows[0]:
            raise AsftError(f"{name} has no column {key!r} to filter by; it has {', '.join(rows[0])}")
        rows = [row for row in rows if str(row[key]) == value]
    return _prompts(rows, name, column)


def _prompts(rows: list[dict[str, Any]], source: str, column: str | None) -> list[Prompt]:
    if not rows:
        return []
    known = {key.lower(): key for key in rows[0] if isinstance(key, str)}
    wanted = (column,) if column else COLUMNS
    found = next((known[name.lower()] for name in wanted if name.lower() in known), None)
    if found is None:
        raise AsftError(
            f"{source} has the columns {', '.join(map(str, rows[0]))}; expected one of {', '.join(wanted)}; rename "
            f"one, or give {source}?column=NAME"
        )
    category = known.get("category")
    prompts = []
    for i, row in enumerate(rows):
        place = f"{source}, row {i + 1}"
        if found not in row:
            raise AsftError(
                f"{place} has {', '.join(map(str, row)) or 'nothing'}; expected {found}, as in the first row"
            )
        if column is None and found.lower() == "messages" and isinstance(row[found], str):
            raise AsftError(f"{place}: messages is {_shortly(row[found])}; expected a list of turns")
        text = _text(row[found], place)
        kind = _category(row.get(category)) if category else ""
        _check_characters(text + kind, place)
        if text:
            prompts.append(Prompt(text, kind, f"{i}"))
    return prompts


def _text(value: Any, place: str) -> str:
    """A prompt as text, "" where there is none; of a list of turns the last user's, as training sets keep prompts."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        asked = [turn.get("content") for turn in value if turn.get("role") == "user"]
        value = asked[-1] if asked else value
    if not isinstance(value, str):
        raise AsftError(f"{place}: the prompt is {_shortly(value)}; expected a string, or turns with text from a user")
    return value.strip()


def _check_characters(text: str, place: str) -> None:
    """JSON may write half a character down (\\ud83d, without the half that follows), which no tokenizer reads."""
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise AsftError(
            f"{place} has half of a surrogate pair, \\u{ord(half[0]):x}; expected whole characters, as in UTF-8"
        )


def _shortly(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


def _category(value: Any) -> str:
    """A category as text; BeaverTails has a flag for each."""
    if isinstance(value, dict):
        return ", ".join(name for name, flag in value.items() if flag)
    return str(value or "")
