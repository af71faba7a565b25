"""The one exception that users meet."""


class AsftError(ValueError):
    """A mistake in what was given to axolotl-asft: its text is one line that says what was found, what was
    expected and what to do. Front ends print that line alone, without a traceback."""
