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
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from axolotl_asft.errors import AsftError, did_you_mean

SHORT_NAME = "asft"
PLUGIN = "axolotl_asft.AsftPlugin"
OUR_NAMES = (SHORT_NAME, PLUGIN, "axolotl_asft.plugin.AsftPlugin")
# The keys of the block that the command line can set; reading them from `args` would cost every command pydantic.
OPTIONS = {
    "direction": "str",
    "direction_sha256": "str",
    "lambda_reg": "float",
    "projector": "str",
    "rank": "int",
    "metric": "str",
    "max_drift": "float",
    "anchor_weight": "float",
    "general_formats": "bool",
    "lora_scaling": "bool",
    "on_uncovered": "str",
    "verify_model": "bool",
}
LISTS = ("modules", "prompt_formats")  # keys that it cannot


def resolve_plugin_name(name: str) -> str:
    """The importable name of a plugin: `asft` is short for `axolotl_asft.AsftPlugin`.

    Raises:
        AsftError: a name that is nearly ours and cannot be loaded; axolotl would train on without it. And one without a
            dot, which no other plugin has.
    """
    if name == SHORT_NAME:
        return PLUGIN
    if isinstance(name, str) and "." not in name and not _nearly_ours(name):
        letter = " (is plugins: a list, with `- ` before each name?)" if len(name) == 1 else ""
        raise AsftError(f"plugins: {name!r} is not a plugin{letter}; expected {SHORT_NAME}, or package.module.Class")
    if name in OUR_NAMES or not isinstance(name, str) or not _nearly_ours(name):
        return name
    if name.startswith("axolotl_asft.") or not _importable(name):
        raise AsftError(f"plugins: {name!r} is not a plugin; did you mean {SHORT_NAME!r} (the same as {PLUGIN!r})?")
    return name


def require_plugin(cfg: dict[str, Any]) -> None:
    """Refuse a config that has an `asft:` block and does not list the plugin, or has one in another spelling.

    Keys of the block that bear its name, `asft_lambda_reg`, are such a spelling; without it they may be axolotl's own.

    Raises:
        AsftError: axolotl would drop the block and train without the constraint.
    """
    refuse_misspelt_block(cfg)
    refuse_strays({key: value for key, value in cfg.items() if str(key).startswith(SHORT_NAME)})
    if cfg.get(SHORT_NAME) is None:
        return
    listed = cfg.get("plugins") or []
    if not any(name in OUR_NAMES for name in listed):
        raise AsftError(
            f"the config has an asft: block, but plugins: lists {list(listed) or 'nothing'}; add `- asft` under "
            "plugins:, or take the block out"
        )


def refuse_misspelt_block(cfg: dict[str, Any]) -> None:
    """Refuse a block that is called `asft` but for its capitals.

    Raises:
        AsftError: there is one, which axolotl would drop.
    """
    for key in cfg:
        if key != SHORT_NAME and str(key).lower() == SHORT_NAME:
            raise AsftError(f"{key}: is not an axolotl key, and axolotl drops it; did you mean {SHORT_NAME}:?")


def refuse_strays(cfg: dict[str, Any], fields: Collection[str] = ()) -> None:
    """Refuse keys of the block that stand outside it, where axolotl would drop them without a word.

    Args:
        fields: of axolotl's own config, which are not ours.

    Raises:
        AsftError: such a key; the run would go on with less than was asked for.
    """
    for key in cfg:
        bare = str(key).removeprefix(f"{SHORT_NAME}_").removeprefix(f"{SHORT_NAME}-").replace("-", "_")
        if key != SHORT_NAME and key not in fields and bare in (*OPTIONS, *LISTS):
            raise AsftError(
                f"{key} stands outside the {SHORT_NAME}: block, where axolotl drops it; indent it under {SHORT_NAME}:, "
                f"or give it as {SHORT_NAME}.{bare} in a sweep or on the command line"
            )


def fold_dotted_keys(cfg: dict[str, Any]) -> None:
    """`asft.lambda_reg: 5` at the top level of a config means `lambda_reg: 5` in its `asft:` block.

    That is what `--sweep` and `--asft.lambda_reg 5` write, since axolotl sets top-level keys alone.
    """
    for dotted in [key for key in cfg if isinstance(key, str) and key.startswith(f"{SHORT_NAME}.")]:
        block = cfg.get(SHORT_NAME)
        if block is not None and not isinstance(block, dict):
            raise AsftError(f"asft: is {block!r}, so {dotted} cannot be set in it; expected a block of keys")
        if block is None:
            cfg[SHORT_NAME] = {}
        cfg[SHORT_NAME][dotted.partition(".")[2]] = cfg.pop(dotted)


def spellings(key: str) -> list[str]:
    """How a key of the block is spelt on the command line, without the leading dashes."""
    return list(dict.fromkeys(f"{SHORT_NAME}.{name}" for name in (key.replace("_", "-"), key)))


def declarations(key: str) -> tuple[str, ...]:
    """The option of a key, as click declares it."""
    yes_or_no = OPTIONS[key] == "bool"
    return tuple(f"--{name}/--no-{name}" if yes_or_no else f"--{name}" for name in spellings(key))


def add_options(options: tuple) -> tuple:
    """axolotl's table of command-line options, with `--asft.lambda-reg` and the block's other keys in it.

    Raises:
        AsftError: the command line has an `--asft.` option that is none; axolotl would ignore it.
    """
    ours = [
        (declarations(key), f"{SHORT_NAME}__{key}", None if kind == "bool" else kind, f"`{key}` of the asft: block")
        for key, kind in OPTIONS.items()
    ]
    known = {name for key in OPTIONS for name in spellings(key)}
    for argument in sys.argv[1:]:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-")
        ours_by_name = name.startswith(tuple(f"{SHORT_NAME}{mark}" for mark in ".-_"))
        if argument.startswith("--") and ours_by_name and name not in known:
            spelt = [f"--{spelling}" for spelling in sorted(known)]
            if name.partition(".")[2].replace("-", "_") in LISTS:
                raise AsftError(f"--{name} is not an option, since it is a list; set it in the {SHORT_NAME} block")
            hint = did_you_mean(f"--{name}", spelt, f"set it in the {SHORT_NAME} block of the config")
            raise AsftError(f"--{name} is not an option; {hint}")
        if name in known and any(other.partition("=")[0] == "--cloud" for other in sys.argv[1:]):
            raise AsftError(
                f"--{name} does not reach a run under --cloud, to which axolotl sends the config alone; set it in the "
                f"{SHORT_NAME} block"
            )
    return (*options, *ours)


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
        fold_dotted_keys(cfg)
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
    """Make an uncaught AsftError end the process with its one line instead of a traceback; exit status 1.

    The line begins one: a progress bar of the training ends without a line break.
    """
    previous = sys.excepthook
    if getattr(previous, "of_asft", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, AsftError):
            after_bar = "\n" if "tqdm" in sys.modules else ""
            print(f"{after_bar}asft: {error}", file=sys.stderr)
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
