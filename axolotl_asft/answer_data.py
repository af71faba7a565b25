"""The aligned model's own answers as training data, for a run that the constraint cannot join."""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text

TYPE = "input_output"  # axolotl's, which takes a text as it is and adds no chat template, no token


def write_answers(turns: Sequence[tuple[str, str]], output: Path, lines: int | None = None) -> int:
    """One answer a line in JSON, for `datasets: [{path: output, type: input_output}]`; returns how many lines.

    The loss is the cross-entropy of the answer's tokens alone; the request is read as the aligned model read it.

    Args:
        turns: (request with the chat template, answer), of a direction file: refusals and harmless ones in turns, of
            which the rarer kind comes several times.
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


def _line(request: str, answer: str) -> str:
    # axolotl reads each segment by itself; where a tokenizer puts a space before it, that is the answer's own
    return json.dumps({"segments": [{"label": False, "text": request}, {"label": True, "text": answer.lstrip(" ")}]})
