"""Files of the Hugging Face Hub, whole and in parts: `owner/name`, `owner/name@revision`, `owner/name:file`."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError, WorkFailed

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

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    def at(self, commit: str) -> str:
        """How to write it with its revision pinned."""
        return str(replace(self, revision=commit))


def direction_path(location: str | Path) -> Path:
    """The local path of a direction file: itself, or where the Hub's cache keeps `owner/name[@revision][:file]`.

    What exists locally is local, and so is a `Path`, what begins like a path (`./`, `/`, `~`), or ends in .safetensors
    and names no file of a repository. Downloads go through huggingface_hub: its cache, its tokens, HF_HUB_OFFLINE and
    HF_ENDPOINT hold. A revision that is no commit can change under its name; a warning says how to pin it.

    Raises:
        AsftError: a folder; no such repository, revision or file, no access, or no connection.
    """
    wanted = hub_file(location)
    path = Path(location).expanduser() if wanted is None else download(wanted)
    if path.is_dir():
        raise AsftError(f"{path} is a folder; expected a direction file, .safetensors, or owner/name on the Hub")
    return path


def hub_file(location: str | Path) -> HubFile | None:
    """What the location of a direction names on the Hub; None of a local path, as `direction_path` tells them apart."""
    wanted = None if isinstance(location, Path) else named_on_the_hub(location)
    return None if wanted is not None and wanted.file is None and str(location).endswith(".safetensors") else wanted


def hub_model(location: str | Path) -> HubFile | None:
    """What the location of a model or an adapter names on the Hub, `owner/name[@revision]`; None of a local path.

    Raises:
        AsftError: it names a file of a repository.
    """
    wanted = named_on_the_hub(location)
    if wanted is not None and wanted.file is not None:
        raise AsftError(
            f"{location} names one file; expected a model: a folder, or on the Hub owner/name or owner/name@revision"
        )
    return wanted


def base_model_of(content: Mapping[str, Any]) -> str | None:
    """The model that an axolotl config trains, with its revision; None where it names none."""
    model, revision = content.get("base_model"), content.get("revision_of_model")
    wanted = hub_model(str(model)) if model and revision else None
    return model if wanted is None else wanted.at(str(revision))


def named_on_the_hub(location: str | Path) -> HubFile | None:
    """What it names on the Hub, a model or a file; None of what exists here or begins like a path (`./`, `/`, `~`)."""
    text = str(location)
    return None if text.startswith((".", "/", "~")) or Path(text).exists() else HubFile.parse(text)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which cannot change under its name."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def download(wanted: HubFile) -> Path:
    """The file in the Hub's cache, downloaded where it is not there yet; a cut download goes on where it stopped."""
    wanted = replace(wanted, file=wanted.file or DIRECTION_FILE)
    with hub_errors(wanted):
        found = _cached(wanted)
    if not is_commit(wanted.revision):
        commit = commit_of(found)
        named = wanted if wanted.file != DIRECTION_FILE else replace(wanted, file=None)
        pin = f"; to pin it write direction: {named.at(commit)}" if commit else ""
        LOG.warning("%s is read at %s, which can change%s", wanted.repo, wanted.revision or "main", pin)
    return found


def weight_files(model: HubFile) -> tuple[str, list[str]]:
    """The commit of a model's revision, and the files of that commit."""
    from huggingface_hub import HfApi

    with hub_errors(model):
        info = _persistently(lambda: HfApi().model_info(model.repo, revision=model.revision))
    return info.sha, [sibling.rfilename for sibling in info.siblings or []]


def small_file(file: HubFile) -> Path:
    """A file such as config.json, in the Hub's cache."""
    with hub_errors(file):
        return _cached(file)


def cached_folder(model: HubFile, needed: list[str]) -> Path | None:
    """The folder of the Hub's cache that holds all these files of a model; None where one is missing."""
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(model):
        found = [try_to_load_from_cache(model.repo, name, revision=model.revision) for name in needed]
    if not found or not all(isinstance(path, str) for path in found):
        return None
    return Path(str(found[0])).parent


def model_folder(location: str | Path) -> Path:
    """A local folder as it is; a model of the Hub, `owner/name[@revision]`, downloaded whole into its cache."""
    wanted = hub_model(location)
    if wanted is None:
        return Path(location).expanduser()
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    doubles = ["consolidated*", "*/*.safetensors"]  # the same weights in another library's form
    with hub_errors(wanted):
        return Path(
            _persistently(
                lambda: snapshot_download(
                    wanted.repo, revision=wanted.revision, allow_patterns=patterns, ignore_patterns=doubles
                )
            )
        )


def fetch_range(file: HubFile, start: int, end: int) -> bytes:
    """Bytes start to end - 1 of a file on the Hub.

    Raises:
        AsftError: no access, no connection, or a server that does not send parts of files.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    assert file.file is not None
    if end <= start:
        return b""
    url = hf_hub_url(file.repo, file.file, revision=file.revision)
    headers = {**build_hf_headers(), "range": f"bytes={start}-{end - 1}"}

    def fetch() -> bytes:
        response = http_backoff("GET", url, headers=headers, timeout=30)
        hf_raise_for_status(response)
        if response.status_code != 206 or len(response.content) != end - start:
            raise WorkFailed(
                f"{file}: asked for {end - start} bytes, got {len(response.content)} (status {response.status_code}); "
                "download the model first: hf download " + file.repo
            )
        return response.content

    with hub_errors(file):
        return _persistently(fetch)


def _cached(wanted: HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    assert wanted.file is not None
    name = wanted.file
    try:
        return Path(_persistently(lambda: hf_hub_download(wanted.repo, name, revision=wanted.revision)))
    except ConnectionError:
        try:
            return Path(hf_hub_download(wanted.repo, name, revision=wanted.revision, local_files_only=True))
        except OSError:
            pass  # what went wrong before is the error to report
        raise


def _persistently(call: Callable[[], Any]) -> Any:
    """The call, again where the connection is cut, which huggingface_hub leaves to its callers."""
    httpx = _client_library()
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (httpx.RemoteProtocolError, httpx.ReadError, RuntimeError) as error:
            # huggingface_hub 1.17 goes on with a client that it closed itself after a failure: a RuntimeError
            if isinstance(error, RuntimeError) and "client has been closed" not in str(error):
                raise
            if attempt + 1 == ATTEMPTS:
                raise ConnectionError(_first_line(error)) from error
            time.sleep(2**attempt)
    raise AssertionError("not reached")


def _client_library() -> Any:
    """httpx, or httpx2 since huggingface_hub 2: of whose errors the Hub's are made."""
    from huggingface_hub import errors

    return import_module(errors.HTTPError.__module__.partition(".")[0])


def commit_of(cached: Path) -> str | None:
    """The commit that a file of the Hub's cache belongs to: models--owner--name/snapshots/COMMIT/file."""
    parts = cached.parts
    if "snapshots" not in parts:
        return None
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    return commit if is_commit(commit) else None


@contextmanager
def hub_errors(wanted: HubFile, sending: bool = False) -> Iterator[None]:
    """The Hub's errors as ours: what was found, and what to do.

    Args:
        sending: it is an upload.
    """
    from huggingface_hub import errors

    httpx = _client_library()
    try:
        yield
    except errors.HFValidationError as error:
        raise AsftError(
            f"{wanted} is neither a file here nor a name on the Hub ({_first_line(error)}); expected owner/name, or a "
            "path"
        ) from error
    except errors.GatedRepoError as error:
        raise AsftError(
            f"{wanted.repo} is gated; request access on its page, and log in with `hf auth login`"
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
        raise _not_here(wanted) from error
    except errors.RemoteEntryNotFoundError as error:
        raise AsftError(
            f"{wanted.repo} has no file {wanted.file}{_others(wanted)}; name the file: {wanted.repo}:FILE"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise AsftError(
                f"{wanted.repo}: access refused ({_first_line(error)}); log in with `hf auth login`"
            ) from error
        raise WorkFailed(f"{wanted}: the Hub failed ({_first_line(error)}); try again") from error
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _of_the_connection(error):
            raise
        if sending:
            raise WorkFailed(
                f"{wanted.repo}: the upload to the Hub failed ({_first_line(error.__cause__ or error)}); try again"
            ) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise _not_here(wanted) from error
        raise WorkFailed(
            f"{wanted} cannot be downloaded ({_first_line(error)}), and nothing here is called {wanted.repo}; check "
            "the name, or try again: what was downloaded is kept"
        ) from error


def _not_here(wanted: HubFile) -> WorkFailed:
    return WorkFailed(
        f"{wanted} is not in the Hub's cache, nothing here is called {wanted.repo}, and the Hub cannot be reached, or "
        "HF_HUB_OFFLINE is set; load it once while online, or check the path"
    )


def _of_the_connection(error: RuntimeError) -> bool:
    """Of some failures huggingface_hub says what happened in a RuntimeError alone."""
    return any(words in str(error) for words in ("Error while uploading", "client has been closed"))


def _others(wanted: HubFile) -> str:
    """Which files it could have been."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
    except Exception:  # the first error is the one to report
        return ""
    found = [file for file in files if file.endswith(".safetensors")]
    return f" (of safetensors: {', '.join(found[:5])})" if found else " (and no other safetensors file)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
