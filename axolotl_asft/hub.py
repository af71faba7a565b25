"""Direction files on the Hugging Face Hub: `owner/name`, `owner/name@revision`, `owner/name:file`."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from axolotl_asft.errors import AsftError

LOG = logging.getLogger("axolotl.asft")

ATTEMPTS = 3
DIRECTION_FILE = "direction.safetensors"  # what a direction is called in its repository, unless a file is named
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_REPOSITORY = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w][\w./-]*))?(?::(?P<file>[\w][\w. /-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the Hub.

    Attributes:
        repo: owner/name.
        revision: branch, tag or commit; None: main.
        file: its path in the repository; None: `DIRECTION_FILE`.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubFile | None":
        """`owner/name[@revision][:file]`; None where it cannot be that."""
        match = _REPOSITORY.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls(match["repo"], match["revision"], match["file"])

    def at(self, commit: str) -> str:
        """How to write it with its revision pinned."""
        return f"{self.repo}@{commit}" + (f":{self.file}" if self.file else "")


def direction_path(location: str | Path) -> Path:
    """The local path of a direction file: itself, or where the Hub's cache keeps `owner/name[@revision][:file]`.

    What exists locally is local, and so is what begins like a path (`./`, `/`, `~`) or ends in .safetensors and names
    no file of a repository. Downloads go through huggingface_hub: its cache, its tokens, HF_HUB_OFFLINE and
    HF_ENDPOINT hold. A revision that is no commit can change under its name; a warning says how to pin it.

    Raises:
        AsftError: no such repository, revision or file, no access, or no connection.
    """
    text = str(location)
    path = Path(text).expanduser()
    if path.exists() or isinstance(location, Path) or text.startswith((".", "/", "~")):
        return path
    wanted = HubFile.parse(text)
    if wanted is None or (wanted.file is None and text.endswith(".safetensors")):
        return path
    return download(wanted)


def download(wanted: HubFile) -> Path:
    """The file in the Hub's cache, downloaded where it is not there yet; a cut download goes on where it stopped."""
    with hub_errors(wanted):
        found = _cached(wanted)
    if wanted.revision is None or not _COMMIT.fullmatch(wanted.revision):
        commit = commit_of(found)
        pin = f"; to pin it write direction: {wanted.at(commit)}" if commit else ""
        LOG.warning("%s is read at %s, which can change%s", wanted.repo, wanted.revision or "main", pin)
    return found


def _cached(wanted: HubFile) -> Path:
    import httpx
    from huggingface_hub import hf_hub_download

    arguments = {"repo_id": wanted.repo, "filename": wanted.file or DIRECTION_FILE, "revision": wanted.revision}
    for attempt in range(ATTEMPTS):
        try:
            return Path(hf_hub_download(**arguments))
        except (httpx.RemoteProtocolError, httpx.ReadError, RuntimeError) as error:
            # cut in the middle; or huggingface_hub 1.17, which goes on with a client that it closed after a failure
            if isinstance(error, RuntimeError) and "client has been closed" not in str(error):
                raise
            if attempt + 1 < ATTEMPTS:
                time.sleep(2**attempt)
                continue
            try:
                return Path(hf_hub_download(**arguments, local_files_only=True))
            except OSError:
                raise ConnectionError(_first_line(error)) from error
    raise AssertionError("not reached")


def commit_of(cached: Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to: models--owner--name/snapshots/COMMIT/file."""
    parts = cached.parts
    if "snapshots" not in parts:
        return None
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    return commit if _COMMIT.fullmatch(commit) else None


@contextmanager
def hub_errors(wanted: HubFile) -> Iterator[None]:
    """The Hub's errors as ours: what was found, and what to do."""
    import httpx
    from huggingface_hub import errors

    file = wanted.file or DIRECTION_FILE
    try:
        yield
    except errors.GatedRepoError as error:
        raise AsftError(
            f"{wanted.repo} is gated; ask for access at its page, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AsftError(
            f"no file {wanted.repo} here, and no repository of that name on the Hub, or a private one; check the name, "
            "or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AsftError(
            f"{wanted.repo} has no revision {wanted.revision}; give a branch, tag or commit of it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise AsftError(
            f"{wanted.repo}:{file} is not in the Hub's cache, and the Hub cannot be reached, or HF_HUB_OFFLINE is set; "
            "load it once while online"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise AsftError(
            f"{wanted.repo} has no file {file}{_others(wanted)}; name the file: {wanted.repo}:FILE"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise AsftError(
                f"{wanted.repo}: access refused ({_first_line(error)}); log in with `hf auth login`"
            ) from error
        raise AsftError(f"{wanted.repo}:{file}: the Hub failed ({_first_line(error)}); try again") from error
    except (httpx.HTTPError, OSError) as error:
        raise AsftError(
            f"{wanted.repo}:{file} cannot be downloaded ({_first_line(error)}); try again, what is there is kept"
        ) from error


def _others(wanted: HubFile) -> str:
    """Which files it could have been."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
    except Exception:  # the first error is the one to report
        return ""
    found = [file for file in files if file.endswith(".safetensors")]
    return f" (of safetensors: {', '.join(found[:5])})" if found else " (and no other safetensors file)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
