"""Keep a chat model's safety while you fine-tune it: the AsFT constraint (arXiv 2506.08473) for axolotl.

from axolotl_asft import AlignmentDirection, AlignmentPenalty, attach, extract_direction
"""

__version__ = "0.1.0"

# Type checkers take this for typing.TYPE_CHECKING; importing typing would cost every start of Python 5 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from axolotl_asft.adapter import AlignmentPenalty
    from axolotl_asft.attaching import attach
    from axolotl_asft.direction import AlignmentDirection
    from axolotl_asft.errors import AsftError
    from axolotl_asft.extract import extract_direction
    from axolotl_asft.plugin import AsftPlugin

__all__ = [
    "AlignmentDirection",
    "AlignmentPenalty",
    "AsftError",
    "AsftPlugin",
    "__version__",
    "attach",
    "extract_direction",
]

# Imported when first asked for: `import axolotl_asft` happens at every start of Python and has to stay cheap.
_HOMES = {
    "AlignmentDirection": "direction",
    "AlignmentPenalty": "adapter",
    "AsftError": "errors",
    "AsftPlugin": "plugin",
    "attach": "attaching",
    "extract_direction": "extract",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as error:
        if name != "AsftPlugin":
            raise
        # axolotl logs an ImportError from a plugin and trains on without it
        from axolotl_asft.guard import import_failure

        raise import_failure(error) from error
