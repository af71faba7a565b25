"""The aligned model's own answers as training data, for a run that the constraint cannot join."""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text
from axolotl_asft.general_formats import general_formats
from axolotl_asft.prompt_formats import asked_ways, filled, format_as_template, plain_requests

TYPE = "input_output"  # axolotl's, which takes a text as it is and adds no chat template, no token


def write_answers(turns: Sequence[tuple[str, str]], output: Path, lines: int | None = None) -> int:
    """One answer a line in JSON, for `datasets: [{path: output, type: input_output}]`; returns how many lines.

    The loss is the cross-entropy of the answer's tokens alone; the request is read as the aligned model read it.

    Args:
        turns: (request as the model reads it, answer), of a direction file or `in_formats`: refusals and
            harmless ones in turns, of which the rarer kind comes several times.
        lines: the turns are repeated until there are as many; None: all of them, each once.

    Raises:
        AsftError: there are no turns.
    """
    if not turns:
        raise AsftError(
            "the direction file holds no answers of the aligned model; make it again with `axolotl asft extract "
            "--metric fisher`"
        )
    count = len(turns) if lines is None else lines
    atomic_write_text(output, "".join(f"{_line(*turn)}\n" for turn in islice(cycle(turns), count)))
    return count


def in_formats(
    tokenizer: Any, turns: Sequence[tuple[str, str]], formats: Sequence[str] = (), general: bool = True
) -> list[tuple[str, str]]:
    """The turns as an anchor asks for them: each pair in the chat template, in a format of the data, in a general one.

    Args:
        tokenizer: the aligned model's.
        formats: of the data (`axolotl_asft.prompt_formats`).
        general: whether the general formats are asked in.

    Raises:
        AsftError: its chat template is not that of the requests, or takes neither a system prompt nor an earlier turn.
    """
    plain = plain_requests(tokenizer, [request for request, _ in turns])
    if plain is None:
        alone = (
            "; or write first turns alone (--no-general-formats), which hold little elsewhere" if not formats else ""
        )
        raise AsftError(
            "the direction file's requests are not in this tokenizer's chat template, so they can be asked in no other "
            f"form; give the aligned model as --model{alone}"
        )
    in_general = general_formats(tokenizer) if general else []
    if general and not in_general:
        raise AsftError(
            "this tokenizer's chat template takes neither a system prompt nor an earlier turn; give the aligned model "
            "as --model, or leave them out (--no-general-formats)"
        )
    templates = {text: format_as_template(tokenizer, text) for text in formats}

    def asked(place: int, way: str | None) -> str:
        if way is None:
            return turns[place][0]
        if way not in templates:
            return filled(way, plain[place])
        turn = [{"role": "user", "content": plain[place]}]
        return tokenizer.apply_chat_template(turn, chat_template=templates[way], tokenize=False)

    ways = asked_ways(len(turns), list(formats), [text for text in in_general if text not in formats])
    return [(asked(place, way), turns[place][1]) for place, way in ways]


def _line(request: str, answer: str) -> str:
    # axolotl reads each segment by itself; where a tokenizer puts a space before it, that is the answer's own
    return json.dumps({"segments": [{"label": False, "text": request}, {"label": True, "text": answer.lstrip(" ")}]})
