"""Whether pictures can be drawn here."""

import logging

from axolotl_asft.errors import AsftError

INSTALL = "pip install 'axolotl-asft[report]'"


def need_matplotlib(what: str) -> None:
    """Refuse to draw where matplotlib is missing, and quieten it where it is not.

    Args:
        what: needs it.

    Raises:
        AsftError: it is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AsftError(f"{what} needs matplotlib; {INSTALL}") from error
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
