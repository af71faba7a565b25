"""The exceptions that users meet, and how their lines are put."""

import textwrap
from collections.abc import Iterable


class AsftError(ValueError):
    """A mistake in what was given to axolotl-asft: its text is one line that says what was found, what was
    expected and what to do. Front ends print that line alone, without a traceback."""


class WorkFailed(AsftError):
    """What was given is right, and the work could not be done all the same: no connection, no memory, no room."""


def one_line(error: BaseException) -> str:
    """The text of another library's error, short enough for a line; it may quote what a file says."""
    text = " ".join(str(error).split())
    if " " in text[:300]:
        return textwrap.shorten(text, 300, placeholder=" ...")
    return text[:300] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """`did you mean WORD?` with the nearest of the known words; `otherwise` where none is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise
