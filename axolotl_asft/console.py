"""What the commands share at the terminal: errors in one line, progress bars. No torch."""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_asft.errors import AsftError, WorkFailed, one_line
from axolotl_asft.yaml_config import read_text

if TYPE_CHECKING:
    from rich.progress import TaskID

# Start a stage with a title and a number of units; what comes back is called with the units that were done.
Stage = Callable[[str, int], Callable[..., None]]


class FilePath(click.Path):
    """A place on this machine as `pathlib.Path`; `~` is the home folder, also after `=`, where shells leave it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(Path(value).expanduser(), param, ctx)


def refuse_idle(ctx: click.Context, needs: dict[str, str]) -> None:
    """Refuse options that would do nothing.

    Args:
        needs: name of an option's parameter -> that of the one that it goes with.

    Raises:
        AsftError: there is such an option.
    """
    spelt, given = {str(each.name): each.opts[-1] for each in ctx.command.params}, given_options(ctx)
    for name, needed in needs.items():
        if name in given and not ctx.params[needed]:
            raise AsftError(f"{spelt[name]} goes with {spelt[needed]}; give that too, or leave it out")


def given_options(ctx: click.Context) -> set[str]:
    """The names of the parameters that were given, and are not there by default."""
    default = click.core.ParameterSource.DEFAULT
    names = {str(each.name) for each in ctx.command.params}
    return {name for name in names if ctx.get_parameter_source(name) is not default}


def written_out(text: str | None) -> str | None:
    """What an option says, or the file that it names with an @."""
    if text and text.startswith("@"):
        return read_text(Path(text[1:])).removesuffix("\n")  # with which editors end a file
    return text


class OneLineErrors(click.Group):
    """Exit status 0 done, 1 the work failed, 2 wrong usage or input; a user error is one line, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AsftError as error:
            click.echo(f"asft: {error}", err=True)
            ctx.exit(1 if isinstance(error, WorkFailed) else 2)
        except Exception as error:
            if not _no_room(error):
                raise
            click.echo(f"asft: {one_line(error)}; make room, or see what else takes it, and try again", err=True)
            ctx.exit(1)


def _no_room(error: Exception) -> bool:
    """Whether the disk or the GPU is full, which is nobody's mistake; told without importing torch or safetensors."""
    full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return full or type(error).__name__ in ("OutOfMemoryError", "MemoryError")


@contextlib.contextmanager
def stages(show: bool) -> Iterator[Stage]:
    """Progress bars with the time left on a terminal, a line a stage elsewhere."""
    if not show:
        yield silent
        return
    if not sys.stderr.isatty():

        def announce(title: str, total: int) -> Callable[..., None]:
            click.echo(f"{title} ...", err=True)
            return lambda done=1: None

        yield announce
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        current: list[TaskID] = []

        def start(title: str, total: int) -> Callable[..., None]:
            for task in current:
                progress.update(task, completed=progress.tasks[task].total)
            started = progress.add_task(title, total=total)
            current[:] = [started]
            return lambda done=1: progress.advance(started, done)

        yield start
        for task in current:
            progress.update(task, completed=progress.tasks[task].total)


def silent(title: str, total: int) -> Callable[..., None]:
    """A stage that shows nothing."""
    return lambda done=1: None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Nothing of the libraries' own words reaches the terminal: what they tell a run tells its check nothing."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def quieten_libraries() -> None:
    """Leave the terminal to the command: the libraries' notes on CPUs and on our stamp tell its reader nothing."""
    for library in ("torchao", "bitsandbytes", "lm_eval", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
    warnings.filterwarnings("ignore", module="bitsandbytes")  # of kernels for the CPU that it would download
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
