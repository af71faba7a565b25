"""The aligned model's own answers as training data, for a run that the constraint cannot join."""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text
from axolotl_asft.general_formats import general_formats
from axolotl_asft.prompt_formats import asked_ways, filled, plain_requests

TYPE = "input_output"  # axolotl's, which takes a text as it is and adds no chat template, no token


def write_answers(turns: Sequence[tuple[str, str]], output: Path, lines: int | None = None) -> int:
    """One answer a line in JSON, for `datasets: [{path: output, type: input_output}]`; returns how many lines.

    The loss is the cross-entropy of the answer's tokens alone; the request is read as the aligned model read it.

    Args:
        turns: (request as the model reads it, answer), of a direction file or `in_general_formats`: refusals and
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


def in_general_formats(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns twice, as an anchor asks for them: each pair in the chat template, and in one of the general formats.

    Args:
        tokenizer: the aligned model's.

    Raises:
        AsftError: its chat template is not that of the requests, or takes neither a system prompt nor an earlier turn.
    """
    general = general_formats(tokenizer)
    plain = plain_requests(tokenizer, [request for request, _ in turns])
    if plain is None or not general:
        raise AsftError(
            "the direction file's requests are not in this tokenizer's chat template, or that takes neither a system "
            "prompt nor an earlier turn; give the aligned model as --model, or write first turns alone "
            "(--no-general-formats), which hold little in later ones"
        )
    ways = asked_ways(len(turns), general=general)
    return [(turns[i][0] if way is None else filled(way, plain[i]), turns[i][1]) for i, way in ways]


def _line(request: str, answer: str) -> str:
    # axolotl reads each segment by itself; where a tokenizer puts a space before it, that is the answer's own
    return json.dumps({"segments": [{"label": False, "text": request}, {"label": True, "text": answer.lstrip(" ")}]})
