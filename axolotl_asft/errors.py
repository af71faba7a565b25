"""The one exception that users meet."""


class AsftError(ValueError):
    """A mistake in what was given to axolotl-asft: its text is one line that says what was found, what was
    expected and what to do. Front ends print that line alone, without a traceback."""


def one_line(error: BaseException) -> str:
    """The text of another library's error, short enough for a line; it may quote what a file says."""
    return " ".join(str(error).split())[:300]
