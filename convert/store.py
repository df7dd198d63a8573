"""The folder of pulled models: a folder a repository, and a record beside every model.

models/user/model/model-Q8_0.gguf                a file, under the name it has in its repository
models/user/model/model-Q8_0.gguf.keelback.json  its record: where it is from, and what it holds
models/user/model/model/                         a checkpoint's original files, if they are kept
models/user/model/.download/                     what has arrived so far, named by its checksum

A model is there when it has a record and every file has the size that the record says. A file that
no record names is somebody else's: it is neither replaced nor removed.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..kernels.errors import InvalidInput
from ..kernels.files import replacing, try_lock
from ..kernels.places import models_folder
from .choice import Name, candidates, is_safe, tag_of

CHECKPOINT = "checkpoint"

_RECORD = ".keelback.json"
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a model: `name` as in its repository, with slashes, and SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """A model that was pulled: at least one file, the first of a split model first.

    kind: "gguf" (as it was in the repository), "converted" or "checkpoint". outtype: what a
    conversion was asked for, else empty. date: in UTC, ISO 8601.
    """

    repo: str
    revision: str
    kind: str
    outtype: str
    date: str
    files: tuple[Part, ...]

    @property
    def first(self) -> str:
        """The name of the file that stands for the model."""
        return self.files[0].name

    @property
    def tag(self) -> str:
        """What follows the colon in the model's name."""
        return CHECKPOINT if self.kind == CHECKPOINT else tag_of(self.first)

    @property
    def name(self) -> str:
        """The model's name, as `user/model:Q8_0`."""
        return f"{self.repo}:{self.tag}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.files)


class Store:
    """The folder of pulled models; it may not be there yet."""

    def __init__(self) -> None:
        try:
            self.folder = models_folder()
        except OSError as error:
            raise InvalidInput(f"{error}; name a folder for models in KEELBACK_MODELS") from None

    def home(self, repo: str) -> Path:
        """The folder of a repository."""
        return self.folder / repo

    def downloads(self, repo: str) -> Path:
        """Where files of a repository arrive."""
        return self.home(repo) / ".download"

    def path(self, record: Record) -> Path:
        """The file of a model, the first one of a split model, the folder of a checkpoint."""
        first = self.home(record.repo) / record.first
        return first.parent if record.kind == CHECKPOINT else first

    def records(self, repo: str = "*/*") -> list[Record]:
        """All records that can be read, or those of a repository, by name."""
        paths = sorted(self.folder.glob(f"{repo}/**/*{_RECORD}"))
        found = (_read(path, self.folder) for path in paths)
        return [record for record in found if record is not None]

    def present(self, repo: str = "*/*") -> list[Record]:
        """The records of models of which every file is there."""
        return [record for record in self.records(repo) if self._complete(record)]

    def unfinished(self) -> dict[str, int]:
        """Bytes that have arrived of what is not there yet, by repository."""
        sizes: dict[str, int] = {}
        for file in sorted(self.folder.glob("*/*/.download/*")):
            repo = file.parent.parent.relative_to(self.folder).as_posix()
            with contextlib.suppress(OSError):  # a pull that goes on may have moved it
                sizes[repo] = sizes.get(repo, 0) + file.stat().st_size
        return sizes

    def listing(self) -> list[dict[str, Any]]:
        """What is there, and what has not arrived completely, as `ls --json` shows it."""
        rows = [
            {
                "name": record.name,
                "type": record.tag,
                "kind": record.kind,
                "bytes": record.size,
                "date": record.date,
                "repo": record.repo,
                "revision": record.revision,
                "path": str(self.path(record)),
                "files": [asdict(part) for part in record.files],
            }
            for record in self.present()
        ]
        empty = {"type": "", "kind": "unfinished", "date": "", "revision": "", "files": []}
        return rows + [
            {"name": f"{repo} (unfinished)", **empty, "bytes": size, "repo": repo,
             "path": str(self.downloads(repo))}
            for repo, size in self.unfinished().items()
        ]  # fmt: skip

    def find(self, name: Name, file: str | None = None) -> Record | None:
        """The model file that a name or a file's name stands for, without any request.

        Raises InvalidInput where it could be several.
        """
        models = {r.first: r for r in self.present(name.repo) if r.kind != CHECKPOINT}
        found = candidates(list(models), name.tag, file)
        if len(found) > 1:
            raise InvalidInput(
                f"{name} could be {' or '.join(found)}; name one of them with --hf-file"
            )
        return models[found[0]] if found else None

    def refuse_foreign(self, repo: str, names: list[str]) -> None:
        """Raise InvalidInput where a file that was not pulled is in the way of one of the names."""
        own = {part.name for record in self.records(repo) for part in record.files}
        for name in names:
            path = self.home(repo) / name
            if name not in own and os.path.lexists(path):
                raise InvalidInput(f"{path} is there and was not pulled; move it away first")

    def add(self, record: Record, arrived: Mapping[str, Path]) -> Path:
        """Move a model's files in, from `arrived[name]`, and return the model's path.

        A model of the same name goes first, then comes the record: whatever ends this half-way,
        the model is not there.
        """
        home = self.home(record.repo)
        self.refuse_foreign(record.repo, [part.name for part in record.files])
        for old in self.records(record.repo):
            if _record_name(old) == _record_name(record):
                self.remove(old)
        path = home / _record_name(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(asdict(record), indent=2) + "\n", "utf-8")
        for part in record.files:
            (home / part.name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived[part.name], home / part.name)
        return self.path(record)

    def remove(self, record: Record) -> None:
        """Remove a model's files, its record, and the folders that are empty then."""
        names = [*(part.name for part in record.files), _record_name(record)]
        for name in names:
            path = self.home(record.repo) / name
            path.unlink(missing_ok=True)
            self._prune(path.parent)

    def clear(self, repo: str) -> None:
        """Remove what has arrived of a repository's files and is no model yet."""
        shutil.rmtree(self.downloads(repo), ignore_errors=True)
        self._prune(self.home(repo))

    def discard(self, *texts: str) -> list[str]:
        """Remove what names stand for: models, or all of repositories; returns what it was.

        Raises InvalidInput for a name of nothing that was pulled, before anything is removed; for
        what is just being pulled, and where the folder cannot be changed.
        """
        removed: list[str] = []
        try:
            for name, records in [self._named(text) for text in texts]:
                with self.lock(name.repo):
                    for record in records:
                        self.remove(record)
                    if not name.tag:
                        self.clear(name.repo)
                removed += [record.name for record in records] or [f"{name.repo}, unfinished"]
        except OSError as error:
            raise InvalidInput(f"{self.folder} cannot be changed: {error.strerror}") from None
        return removed

    def _named(self, text: str) -> tuple[Name, list[Record]]:
        """A name of something that was pulled, and the records that it stands for."""
        unfinished = self.unfinished()
        try:
            name = Name.parse(text)
        except InvalidInput:
            raise InvalidInput(self._unknown(text, [*unfinished])) from None
        tag = name.tag.lower()
        records = [r for r in self.records(name.repo) if tag in ("", r.tag.lower())]
        if not records and (tag or name.repo not in unfinished):
            raise InvalidInput(self._unknown(text, [*unfinished]))
        return name, records

    @contextlib.contextmanager
    def lock(self, repo: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the only process that changes a repository's folder; it ends with the process.

        `waiting` is called once when another process has it; without, InvalidInput is raised.
        """
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / repo.replace("/", "--"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _locked(descriptor):
                if waiting is None:
                    raise InvalidInput(f"{repo} is being pulled by another process; wait for it")
                waiting()
                waiting = _nothing
                time.sleep(_PAUSE)
            yield
        finally:
            os.close(descriptor)

    def _complete(self, record: Record) -> bool:
        try:
            home = self.home(record.repo)
            return all((home / part.name).stat().st_size == part.size for part in record.files)
        except OSError:
            return False

    def _prune(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            while folder != self.folder:
                folder.rmdir()
                folder = folder.parent

    def _unknown(self, text: str, unfinished: list[str]) -> str:
        names = list(dict.fromkeys([*(record.name for record in self.records()), *unfinished]))
        near = difflib.get_close_matches(text, names, cutoff=0.5) or names[:3]
        there = f"there is {', '.join(near)}" if near else "nothing has been pulled yet"
        return f"{text[:80]!r} names nothing that was pulled; {there} (`keelback ls` lists all)"


def _record_name(record: Record) -> str:
    folder = PurePosixPath(record.first).parent
    return f"{folder if record.kind == CHECKPOINT else record.first}{_RECORD}"


def _read(path: Path, store: Path) -> Record | None:
    """A record, or None for a file that is none: what it names is removed, so it is not trusted."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        files = tuple(Part(**part) for part in values.pop("files"))
        record = Record(**values, files=files)
        sound = (
            all(isinstance(value, str) for value in values.values())
            and all(is_safe(part.name) and type(part.size) is int for part in files)
            and path == store / record.repo / _record_name(record)
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    return record if sound else None


def _locked(descriptor: int) -> bool:
    """Whether this process has the lock now; where the file system has none, everybody has."""
    try:
        return try_lock(descriptor)
    except OSError:
        return True


def _nothing() -> None:
    pass
