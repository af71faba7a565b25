"""What axolotl lets pass in silence and this package must not.

axolotl logs an ImportError while it loads a plugin and trains on, drops a config block that no plugin claims, and
splits plugin names at a dot. The wrappers here go around the functions in which that happens; `startup` puts them
there. The standard library alone is imported here.
"""

import contextlib
import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from axolotl_asft.errors import AsftError

SHORT_NAME = "asft"
PLUGIN = "axolotl_asft.AsftPlugin"
OUR_NAMES = (SHORT_NAME, PLUGIN, "axolotl_asft.plugin.AsftPlugin")


def resolve_plugin_name(name: str) -> str:
    """The importable name of a plugin: `asft` is short for `axolotl_asft.AsftPlugin`.

    Raises:
        AsftError: a name that is nearly ours and cannot be loaded; axolotl would train on without it.
    """
    if name == SHORT_NAME:
        return PLUGIN
    if name in OUR_NAMES or not isinstance(name, str) or not _nearly_ours(name):
        return name
    if name.startswith("axolotl_asft.") or not _importable(name):
        raise AsftError(f"plugins: {name!r} is no plugin; did you mean {SHORT_NAME!r} (the same as {PLUGIN!r})?")
    return name


def require_plugin(cfg: dict[str, Any]) -> None:
    """Refuse a config that has an `asft:` block and does not list the plugin.

    Raises:
        AsftError: axolotl would drop the block and train without the constraint.
    """
    if cfg.get(SHORT_NAME) is None:
        return
    listed = cfg.get("plugins") or []
    if not any(name in OUR_NAMES for name in listed):
        raise AsftError(
            f"the config has an asft: block, but plugins: lists {list(listed) or 'nothing'}; add `- asft` under "
            "plugins:, or take the block out"
        )


def wrap_load_plugin(load_plugin: Callable[[str], Any]) -> Callable[[str], Any]:
    """axolotl's `load_plugin`, with our short name known and our import failures loud."""

    @functools.wraps(load_plugin)
    def guarded(plugin_name: str) -> Any:
        resolved = resolve_plugin_name(plugin_name)
        try:
            return load_plugin(resolved)
        except ImportError as error:
            if resolved in OUR_NAMES:
                raise import_failure(error) from error
            raise

    return guarded


def wrap_validate_config(validate_config: Callable[..., Any]) -> Callable[..., Any]:
    """axolotl's `validate_config`, which would drop our block where our plugin is not listed."""

    @functools.wraps(validate_config)
    def guarded(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        require_plugin(cfg)
        return validate_config(cfg, *args, **kwargs)

    return guarded


def wrap_print_logo(print_logo: Callable[[], None]) -> Callable[[], None]:
    """axolotl's logo, on standard error before our commands, whose standard output programs may read."""

    @functools.wraps(print_logo)
    def guarded() -> None:
        with contextlib.redirect_stdout(sys.stderr) if sys.argv[1:2] == [SHORT_NAME] else contextlib.nullcontext():
            print_logo()

    return guarded


def import_failure(error: ImportError) -> AsftError:
    """The error that says that this package cannot be imported; no ImportError, which axolotl swallows."""
    return AsftError(f"axolotl-asft cannot be imported ({error}); repair the installation: pip install -U axolotl-asft")


def print_user_errors_in_one_line() -> None:
    """Make an uncaught AsftError end the process with its one line instead of a traceback; exit status 1."""
    previous = sys.excepthook
    if getattr(previous, "of_asft", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, AsftError):
            print(f"asft: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    excepthook.of_asft = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def _nearly_ours(name: str) -> bool:
    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    candidate = plain(name)
    if "asft" in candidate:
        return True
    ours = [SHORT_NAME, "axolotl_asft", PLUGIN]
    return any(difflib.SequenceMatcher(None, candidate, plain(known)).ratio() >= 0.8 for known in ours)


def _importable(name: str) -> bool:
    """Whether axolotl's loader would find the module part of `name`: as it stands or among its integrations."""
    module = name.rpartition(".")[0]
    if not module:
        return False
    for candidate in (module, f"axolotl.integrations.{module}"):
        try:
            if importlib.util.find_spec(candidate) is not None:
                return True
        except (ImportError, ValueError):
            continue
    return False
