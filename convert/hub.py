"""The Hugging Face hub, through huggingface_hub: what a repository holds, and one file of it.

Requests, tokens, proxies and HF_ENDPOINT are huggingface_hub's. Its own download of a file throws
away what has arrived when it is interrupted and compares no checksum, so the body of a file is read
here: into a file named by its checksum, to which a later attempt appends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, errors, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from ..kernels.errors import InvalidFile, InvalidInput, KeelbackError
from .store import Part

#: Seconds before the next attempt, as long as none brings a new byte; then it is given up.
WAITS = (1.0, 2.0, 4.0, 8.0)
CHUNK_BYTES = 1 << 20

_TEMPORARY = (408, 429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}|git-[0-9a-f]{40}")

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of a repository at a commit.

    digest: `sha256-` and hex, or, for small files, git's: `git-` and hex.
    """

    repo: str
    revision: str
    name: str
    size: int
    digest: str

    @property
    def arrived(self) -> str:
        """What it is called until it is a part of a model: by content, so that none is mixed up."""
        return f"{self.digest}-{PurePosixPath(self.name).name}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at a commit."""

    revision: str
    files: dict[str, Remote]


class Hub:
    """The hub that HF_ENDPOINT names.

    Every method raises InvalidInput with the remedy where the hub does not do what is asked,
    InvalidFile where what it sends is not what it lists.
    """

    def __init__(self, token: str | None = None) -> None:
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise InvalidInput("the token holds characters that no token of the hub has")
        self._api = HfApi(token=token)
        if not _is_address(self._api.endpoint):
            raise InvalidInput(
                f"HF_ENDPOINT is {self._api.endpoint!r}, which is no address; unset it, or name a "
                "hub's as https://host"
            )
        self._headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}

    def listing(self, repo: str, revision: str | None = None) -> Listing:
        """What a repository holds, at its main branch or at a branch, tag or commit."""
        with self._explained(repo):
            try:
                info = self._api.model_info(
                    repo, revision=revision, files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )  # fmt: skip
                commit = info.sha if _COMMIT.fullmatch(info.sha or "") else None
                files = [_remote(repo, commit or "", entry) for entry in info.siblings or []]
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise self._no_hub() from None
        if commit is None:
            raise self._no_hub()
        return Listing(commit, {file.name: file for file in files if file is not None})

    def fetch(self, remote: Remote, folder: Path, progress: Progress) -> tuple[Path, Part]:
        """A file, downloaded into a folder, resumed, and checked: its path and its record.

        `progress` is told the bytes of it that are there. What was interrupted stays there, with
        `.partial` at its end.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / remote.arrived
        seal = _checked(path, remote) if path.exists() else None
        seal = seal or _take_cached(remote, path) or self._arrived(remote, path, progress)
        progress(remote.size)
        return path, seal

    def _arrived(self, remote: Remote, path: Path, progress: Progress) -> Part:
        """Download a file and check it; what was there of it before may have been wrong."""
        partial = path.with_name(f"{path.name}.partial")
        while True:
            resumed = partial.exists()
            with self._explained(remote.repo):
                self._download(remote, partial, progress)
            seal = _checked(partial, remote)
            if seal is not None:
                os.replace(partial, path)
                return seal
            partial.unlink()
            if not resumed:
                raise InvalidFile(
                    f"{remote.repo}: {remote.name} arrived with another checksum than the hub "
                    "lists for it; pull it again, and do not trust it if that does not help"
                )

    def _download(self, remote: Remote, partial: Path, progress: Progress) -> None:
        """Append to what has arrived, again and again while attempts bring something new."""
        waits = iter(WAITS)
        with open(partial, "ab") as file:
            most = file.tell()
            while file.tell() != remote.size:
                trouble = self._attempt(remote, file, progress)
                if file.tell() > most:
                    most, waits = file.tell(), iter(WAITS)
                    continue
                wait = next(waits, None)
                if wait is None:
                    raise trouble or _other(remote)
                time.sleep(wait)

    def _attempt(self, remote: Remote, file: BinaryIO, progress: Progress) -> Exception | None:
        """Append as much of a file as comes; returns what broke it off, if it may pass."""
        endpoint = self._api.endpoint
        url = hf_hub_url(remote.repo, remote.name, revision=remote.revision, endpoint=endpoint)
        have = file.tell() if file.tell() <= remote.size else _restart(file)
        headers = {**self._headers, **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_exceptions=(), retry_on_status_codes=(),
            ) as response:  # fmt: skip
                hf_raise_for_status(response)
                whole = response.status_code != 206
                if whole:
                    _restart(file)
                for chunk in response.iter_bytes():
                    file.write(chunk[: remote.size + 1 - file.tell()])
                    progress(min(file.tell(), remote.size))
                    if file.tell() > remote.size:
                        break
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 416:
                _restart(file)
            elif error.response.status_code not in _TEMPORARY:
                raise
            return error
        except errors.HTTPError as error:
            return error
        if file.tell() > remote.size or (whole and file.tell() < remote.size):
            _restart(file)
            raise _other(remote)
        return None

    @contextlib.contextmanager
    def _explained(self, repo: str) -> Iterator[None]:
        """Turn what huggingface_hub and its client raise into one sentence each."""
        try:
            yield
        except KeelbackError:
            raise
        except errors.OfflineModeIsEnabled:
            raise InvalidInput(
                f"{repo} is not here, and HF_HUB_OFFLINE forbids to ask the hub; unset it to pull"
            ) from None
        except errors.HfHubHTTPError as error:
            raise InvalidInput(self._refusal(repo, error)) from None
        # The errors of the HTTP client, whose package differs between versions.
        except errors.HTTPError as error:
            if type(error).__name__ == "TooManyRedirects":
                raise self._no_hub() from None
            raise InvalidInput(
                f"{self._api.endpoint} cannot be reached or breaks off ({_reason(error)}); check "
                "the network, then pull again: what has arrived is kept"
            ) from None

    def _refusal(self, repo: str, error: Any) -> str:
        status, where = error.response.status_code, f"{self._api.endpoint}/{repo}"
        if isinstance(error, errors.GatedRepoError) or status == 403:
            return (
                f"{repo} is gated or forbidden to you; accept its terms at {where}, then give a "
                "token that may read it in HF_TOKEN or with --hf-token"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{repo} has no such revision; {where} lists its branches and tags"
        if isinstance(error, errors.EntryNotFoundError):
            return f"{repo} was changed while it was being pulled; pull it again"
        if isinstance(error, errors.DisabledRepoError):
            return f"{repo} has been disabled by the hub; choose another repository"
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            return (
                f"{where} is not there, or is private; check the name, or give a token that may "
                "read it in HF_TOKEN or with --hf-token"
            )
        return f"{where} cannot be read: the hub answers {status}; try again later"

    def _no_hub(self) -> KeelbackError:
        return InvalidFile(
            f"{self._api.endpoint} does not answer as the hub does; check HF_ENDPOINT, and whether "
            "a proxy or a login page stands between"
        )


def _other(remote: Remote) -> InvalidFile:
    return InvalidFile(
        f"{remote.repo}: the hub does not send the {remote.size} bytes that it lists for "
        f"{remote.name}; pull it again"
    )


def _remote(repo: str, revision: str, sibling: Any) -> Remote | None:
    """A file of a listing; None without size and checksum, as no file should be."""
    if sibling.lfs is not None:
        size, digest = sibling.lfs.size, f"sha256-{sibling.lfs.sha256}"
    else:
        size, digest = sibling.size, f"git-{sibling.blob_id}"
    if type(size) is not int or size < 0 or not _DIGEST.fullmatch(digest):
        return None
    return Remote(repo, revision, str(sibling.rfilename), size, digest)


def _take_cached(remote: Remote, path: Path) -> Part | None:
    """Take a file that huggingface_hub's own cache has: a second name for it, or a copy."""
    cached = try_to_load_from_cache(remote.repo, remote.name, revision=remote.revision)
    seal = _checked(Path(cached), remote) if isinstance(cached, str) else None
    if seal is not None:
        source, copy = os.path.realpath(str(cached)), path.with_name(f"{path.name}.partial")
        copy.unlink(missing_ok=True)
        try:
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)
        os.replace(copy, path)
    return seal


def _checked(path: Path, remote: Remote) -> Part | None:
    """A file's record where it has the size and the checksum that the hub lists, else None."""
    size = path.stat().st_size
    if size != remote.size:
        return None
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    small = remote.digest.startswith("git-")
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            if small:
                git.update(chunk)
    found = f"git-{git.hexdigest()}" if small else f"sha256-{sha256.hexdigest()}"
    return Part(remote.name, size, sha256.hexdigest()) if found == remote.digest else None


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _restart(file: BinaryIO) -> int:
    file.seek(0)
    return file.truncate()


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__
