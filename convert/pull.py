"""Pulling a model from the hub into the store, and finding one that is there without a request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..kernels.errors import InvalidInput, KeelbackError, UnsupportedModel
from ..kernels.files import check_space
from ..kernels.formats.gguf import GGUF
from . import OUTTYPES, architecture_of, convert
from .choice import Name, checkpoint_files, choose, gguf_models
from .config import read_json
from .layouts import described
from .mixture import FILE_TYPES, file_type
from .store import CHECKPOINT, Part, Record, Store

if TYPE_CHECKING:
    from .hub import Hub, Listing, Remote

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pull. name: as Name.parse reads it. file: one GGUF file, in place of a tag.

    outtype: convert the checkpoint to that type ("auto": its own), also where there are GGUF files.
    keep: leave the checkpoint's original files in the store. revision: a branch, a tag or a commit.
    token: of the hub; without, the one huggingface_hub knows.
    """

    name: str
    file: str | None = None
    outtype: str | None = None
    keep: bool = False
    revision: str | None = None
    token: str | None = None


def pull(
    wanted: Wanted,
    notice: Callable[[str], None],
    report: Report = lambda label, done, total: None,
) -> Path:
    """Download a model, convert it if it is a checkpoint, and return its GGUF file.

    What is there at the hub's newest revision is not downloaded again. `notice` is told what was
    done besides; `report` a step, its progress and its end. Raises InvalidInput, InvalidFile or
    UnsupportedModel; what has arrived then stays, and the next pull goes on from there.
    """
    return _Pull(wanted, notice, report).run(found=False)


def locate(
    wanted: Wanted,
    offline: bool = False,
    notice: Callable[[str], None] = lambda text: None,
    report: Report = lambda label, done, total: None,
) -> Path:
    """The file of a model: the one that was pulled, without a request, else `pull`'s.

    Raises as `pull` does, and InvalidInput for a model that is not there if `offline`.
    """
    name, store = Name.parse(wanted.name), Store()
    record = store.find(name, wanted.file)
    if record is not None:
        return store.path(record)
    if offline:
        raise InvalidInput(f"{name} has not been pulled; leave --offline out to download it")
    return _Pull(wanted, notice, report).run(found=True)


class _Pull:
    def __init__(self, wanted: Wanted, notice: Callable[[str], None], report: Report) -> None:
        self._wanted, self._notice, self._report = wanted, notice, report
        self._name, self._store = Name.parse(wanted.name), Store()
        self._repo = self._name.repo
        if wanted.outtype is not None and (self._name.tag or wanted.file):
            raise InvalidInput(f"{self._name}: give a tag, a file or --outtype, not two of them")

    def run(self, found: bool) -> Path:
        """Pull, as the only process that pulls this repository.

        found: be content with what another process has pulled in the meantime.
        """
        with self._writing(), self._store.lock(self._repo, self._waiting):
            record = self._store.find(self._name, self._wanted.file) if found else None
            if record is None:
                record = self._newest()
                self._store.clear(self._repo)
            return self._store.path(record)

    def _newest(self) -> Record:
        hub = _open_hub(self._wanted.token)
        listing = hub.listing(self._repo, self._wanted.revision)
        models = gguf_models(listing.files, self._repo)
        if models and self._wanted.outtype is None:
            first = choose(list(models), self._name, self._wanted.file)
            return self._gguf(hub, listing, models[first])
        return self._checkpoint(hub, listing)

    def _gguf(self, hub: Hub, listing: Listing, names: list[str]) -> Record:
        files = [listing.files[name] for name in names]
        for record in self._store.present(self._repo):
            same = {f"sha256-{part.sha256}" for part in record.files}
            if record.first == names[0] and same == {file.digest for file in files}:
                self._notice(f"{record.name} is there already")
                return record
        self._store.refuse_foreign(self._repo, names)
        self._check_room(files)
        return self._add("gguf", listing.revision, self._fetch(hub, files))

    def _checkpoint(self, hub: Hub, listing: Listing) -> Record:
        outtype = self._outtype()
        for record in self._store.present(self._repo):
            same = record.outtype == outtype or record.tag.lower() == outtype
            if record.kind == "converted" and record.revision == listing.revision and same:
                self._notice(f"{record.name} is there already")
                return record
        original = self._original(hub, listing, outtype)
        record = self._converted(original, outtype)
        if self._wanted.keep:
            self._notice(f"the original files are kept in {self._store.path(original)}")
        else:
            self._store.remove(original)
            self._notice("the original files are removed again; --keep would leave them there")
        return record

    def _outtype(self) -> str:
        """The type to convert to, from the tag or the option; "auto" without."""
        if self._wanted.file is not None:
            raise InvalidInput(f"{self._repo} has no GGUF files; leave --hf-file out to convert it")
        outtype = self._name.tag or self._wanted.outtype or "auto"
        if outtype.lower() == "auto":
            return "auto"
        try:
            return file_type(outtype).name.lower()
        except InvalidInput:
            raise InvalidInput(
                f"{self._name}: the repository holds a checkpoint, which is converted to one of "
                f"{', '.join(OUTTYPES[1:])}; name one of these, or a repository of GGUF files"
            ) from None

    def _original(self, hub: Hub, listing: Listing, outtype: str) -> Record:
        """The checkpoint itself, in the store."""
        for record in self._store.present(self._repo):
            if record.kind == CHECKPOINT and record.revision == listing.revision:
                return record
        names = checkpoint_files(listing.files)
        if not names and self._wanted.outtype and gguf_models(listing.files, self._repo):
            raise InvalidInput(
                f"{self._repo} holds only GGUF files, which --outtype does not convert; leave "
                "it out"
            )
        if not names:
            raise UnsupportedModel(
                f"{self._repo} holds no weights that can be read (*.safetensors, "
                "pytorch_model*.bin or *.gguf); choose another repository"
            )
        folder = self._repo.split("/")[1]
        self._store.refuse_foreign(self._repo, [f"{folder}/{name}" for name in names])
        files = [listing.files[name] for name in names]
        self._check_room(files, converted=2.0 if outtype == "f32" else 1.0)
        arrived = self._fetch(hub, [f for f in files if _is_small(f)])
        self._refuse_unknown(arrived)
        arrived |= self._fetch(hub, [f for f in files if not _is_small(f)])
        moved = {
            replace(part, name=f"{folder}/{part.name}"): path for part, path in arrived.items()
        }
        return self._add(CHECKPOINT, listing.revision, moved)

    def _refuse_unknown(self, arrived: dict[Part, Path]) -> None:
        """Do not download the weights of a model that cannot be converted."""
        for part, path in arrived.items():
            if part.name == "config.json":
                config, _ = described(Path(self._repo, part.name), read_json(path))
                architecture_of(config)

    def _converted(self, original: Record, outtype: str) -> Record:
        folder, downloads = self._store.path(original), self._store.downloads(self._repo)
        downloads.mkdir(parents=True, exist_ok=True)
        target = downloads / "converted.gguf"
        try:
            convert(
                folder, target, outtype, self._notice,
                lambda done, total: self._report("converting", done, total),
            )  # fmt: skip
        except KeelbackError:
            self._notice(f"{folder} is kept; `keelback rm {self._repo}` removes it")
            raise
        code = GGUF(target).metadata["general.file_type"]
        kind = next(name for name, known in FILE_TYPES.items() if known.code == code)
        with open(target, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        part = Part(f"{folder.name}-{kind}.gguf", target.stat().st_size, digest)
        return self._add("converted", original.revision, {part: target}, outtype)

    def _fetch(self, hub: Hub, files: list[Remote]) -> dict[Part, Path]:
        folder, total = self._store.downloads(self._repo), sum(file.size for file in files)
        arrived: dict[Part, Path] = {}

        def progress(done: int) -> None:
            before = sum(part.size for part in arrived)
            self._report("downloading", before + done, total)

        for file in files:
            path, part = hub.fetch(file, folder, progress)
            arrived[part] = path
        return arrived

    def _add(
        self, kind: str, revision: str, arrived: dict[Part, Path], outtype: str = ""
    ) -> Record:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(self._repo, revision, kind, outtype, date, tuple(arrived))
        self._store.add(record, {part.name: path for part, path in arrived.items()})
        return record

    def _check_room(self, files: list[Remote], converted: float = 0.0) -> None:
        """Raise InvalidInput where what is still to come does not fit on the disk."""
        folder = self._store.downloads(self._repo)
        folder.mkdir(parents=True, exist_ok=True)
        total = sum(file.size for file in files)
        there = sum(
            path.stat().st_size
            for file in files
            for path in (folder / file.arrived, folder / f"{file.arrived}.partial")
            if path.exists()
        )
        remedy = "make room, or name another folder in KEELBACK_MODELS"
        needed = total - there + converted * total
        check_space(self._store.folder, needed, f"what is to come of {self._name}", remedy)

    def _waiting(self) -> None:
        self._notice(f"another process is pulling {self._repo}; waiting for it")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what an interrupt leaves, and name the folder that cannot be written."""
        try:
            yield
        except KeyboardInterrupt:
            self._notice("interrupted; the same command goes on from here")
            raise
        except OSError as error:
            raise InvalidInput(
                f"{self._store.folder} cannot be written: {error.strerror or error}; mend that, or "
                "name another folder in KEELBACK_MODELS"
            ) from None


def _is_small(file: Remote) -> bool:
    return PurePosixPath(file.name).suffix not in (".safetensors", ".bin")


def _open_hub(token: str | None) -> Hub:
    try:
        from .hub import Hub
    except ImportError:
        raise InvalidInput(
            "models are pulled with huggingface_hub 1.0 or newer; pip install 'keelback[hub]'"
        ) from None
    return Hub(token)
