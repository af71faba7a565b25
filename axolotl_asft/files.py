"""Writing files so that they are never seen half-written, and reading JSON that may be damaged."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from axolotl_asft.errors import AsftError, WorkFailed, one_line

LOCK = ".lock"  # in an output folder, see `locked`


class NotWritten(AsftError, OSError):
    """A file that cannot be written; an OSError too, for those who go on without it."""


class NoRoom(NotWritten, WorkFailed):
    """One for which there is no room."""


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Create or replace `path` with what `write(temporary)` leaves in a temporary file beside it.

    The temporary file is synced to disk and renamed over `path` in one step, so that a reader finds the old
    file or the new one; if `write` raises, `path` stays as it was. A link stays a link, to a new file.

    Raises:
        NotWritten: for an OSError of the system's, also in `write`.
    """
    try:
        _atomic_write(Path(os.path.realpath(Path(path).expanduser())), write)
    except OSError as error:
        if error.errno is None:
            raise  # not of the system: another library's way to say something
        raise _not_written(path, error) from error


def _not_written(path: str | Path, error: OSError) -> NotWritten:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind, what_to_do = (NoRoom, "make room, and try again") if full else (NotWritten, "give another place")
    found = kind(f"{path} cannot be written ({error.strerror}); {what_to_do}")
    found.strerror = error.strerror
    return found


def _atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Create or replace `path` with `text` in UTF-8; see `atomic_write`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(path, write)


def read_json(path: Path, instead: str) -> dict[str, Any]:
    """The keys of a JSON file.

    Args:
        instead: what to do where there are none.

    Raises:
        AsftError: no such file, no JSON, or no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        missing = f"file {path}" if path.parent.is_dir() else f"folder {path.parent}"
        raise AsftError(f"there is no {missing}; {instead}") from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else one_line(error)
        raise AsftError(f"{path} cannot be read as JSON ({why}); {instead}") from error
    return json_object(text, path, instead)


def json_object(text: str, place: str | Path, instead: str) -> dict[str, Any]:
    """The keys of an object in JSON: of a file's text, or of a line of it.

    Args:
        place: where it stands, for the message.
        instead: what to do where it is none.

    Raises:
        AsftError: no JSON, or no object.
    """
    content = json_value(text, place, instead)
    if not isinstance(content, dict):
        raise AsftError(f"{place} holds no JSON object; {instead}")
    return content


def json_value(text: str, place: str | Path, instead: str) -> Any:
    """What JSON says; see `json_object`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = one_line(error)
        if isinstance(error, json.JSONDecodeError) and error.lineno == 1:  # of what may be a later line of a file
            why = f"{error.msg}, column {error.colno}"
        raise AsftError(f"{place} cannot be read as JSON ({why}); {instead}") from error


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no NaN, and no infinity: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named_folder(option: str, text: str) -> tuple[str, Path]:
    """The name and the folder of `NAME=DIR`, or of `DIR`, whose last part is the name then; it may have a = in it.

    Args:
        option: of the command line, for the message.

    Raises:
        AsftError: one of the two is empty.
    """
    name, equals, place = text.partition("=")
    if not equals or Path(text).expanduser().is_dir():
        name, place = Path(text).expanduser().resolve().name, text
    if not name or not place:
        raise AsftError(f"{option} is {text!r}; expected a folder, or NAME=DIR, as plain=out/plain")
    return name, Path(place).expanduser()


def seen_from_here() -> str:
    """What to say of a path in a config that leads nowhere."""
    return f"seen from {Path.cwd()}; paths in a config are relative to where the command runs, not to the config"


def short_names(places: Iterable[str]) -> dict[str, str]:
    """Place -> the last part of it, or the whole where several end alike."""
    names = {place: Path(place).name for place in places}
    often = Counter(names.values())
    return {place: name if often[name] == 1 else place for place, name in names.items()}


def writable_folder(path: Path) -> None:
    """Make a folder for output, before anything long is begun.

    Raises:
        AsftError: there is none and none can be made, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise AsftError(f"nothing can be written to {path} ({error.strerror}); give another --output") from error


def locked(path: Path, busy: str) -> TextIO:
    """This process's alone, until the file is closed or the process ends, where the system has such locks.

    Args:
        path: a file for the lock, which stays there.
        busy: what to say where another process holds it.

    Raises:
        AsftError: another process does, or the file is somebody else's.
    """
    try:
        lock = path.open("w")
    except OSError as error:
        raise AsftError(f"{path} cannot be written ({error.strerror}); give another --output") from error
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise AsftError(busy) from None
    except (ImportError, OSError):
        pass  # there are no such locks here
    return lock


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def refuse_to_replace(output: Path, force: bool) -> None:
    """Stop before any work where a command's output is there already.

    Raises:
        AsftError: it is, and nobody said --force.
    """
    if output.exists() and not force:
        raise AsftError(f"{output} exists; give another --output, or --force to replace it")


def refuse_to_replace_file(output: Path, force: bool) -> None:
    """`refuse_to_replace` where the output is one file: --force replaces no folder by it.

    Raises:
        AsftError: there is a folder, or a file, and nobody said --force.
    """
    if output.is_dir():
        raise AsftError(f"{output} is a folder; expected the name of a file, give another --output")
    refuse_to_replace(output, force)


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pinned_sha256(path: str | Path, expected: str | None, by: str) -> str:
    """The sha256 of a file; where one is expected, of that file alone.

    Args:
        by: the key or option that gives the expected one.

    Raises:
        AsftError: it is another file.
    """
    found = file_sha256(path)
    if expected is not None and found != expected.lower():
        raise AsftError(f"{path} has sha256 {found}; expected {expected} ({by}); get the pinned file")
    return found
