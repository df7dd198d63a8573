"""What was pulled and is kept: disks that fail, files of others, and what is removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hubserver import GGUF, HubServer, locate_fails, pulled
from keelback.convert.store import Store
from keelback.kernels.errors import InvalidInput


def test_a_disk_that_is_too_small_is_seen_beforehand(server: HubServer, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InvalidInput, match=r"to come of .* and 0.00 GB are free .*KEELBACK_MODELS"):
        pulled(GGUF)
    assert server.downloads() == []


def test_a_store_that_cannot_be_written_is_named(server: HubServer, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEELBACK_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(InvalidInput, match="cannot be written: Not a directory"):
        pulled(GGUF)


def test_a_file_of_somebody_else_is_neither_replaced_nor_removed(server: HubServer):
    path = Store().home(GGUF) / "mamba-Q8_0.gguf"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="was not pulled; move it away"):
        pulled(GGUF)
    assert server.downloads() == []
    pulled(f"{GGUF}:F16")
    assert Store().discard(GGUF) == [f"{GGUF}:F16"]
    assert path.read_text() == "mine"


def test_removing_takes_what_the_name_says_and_nothing_else(server: HubServer):
    kept, gone = pulled(f"{GGUF}:F16"), pulled(f"{GGUF}:Q8_0")
    assert Store().discard(f"{GGUF}:q8_0") == [f"{GGUF}:Q8_0"]
    assert kept.exists() and not gone.exists()
    for name in (f"{GGUF}:Q8_0", "user/mamba-GUFF", "user/other", "mamba-gguf", str(gone)):
        with pytest.raises(InvalidInput, match=rf"names nothing that was pulled; .*{GGUF}:F16"):
            Store().discard(name)
    with pytest.raises(InvalidInput, match="names nothing that was pulled"):
        Store().discard(f"{GGUF}:F16", f"{GGUF}:typo")
    assert kept.exists()
    assert Store().discard(GGUF) == [f"{GGUF}:F16"]
    with pytest.raises(InvalidInput, match="nothing has been pulled yet"):
        Store().discard(GGUF)


BAD_RECORDS: dict[str, Callable[[dict], object]] = {
    "a path outside": lambda r: r["files"][0].update(name="../../../precious"),
    "an absolute path": lambda r: r["files"][0].update(name="/precious"),
    "another repository": lambda r: r.update(repo="../.."),
    "no files": lambda r: r.update(files=[]),
    "a size that is none": lambda r: r["files"][0].update(size="3"),
    "an unknown key": lambda r: r.update(more=1),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_was_tampered_with_is_not_followed(
    server: HubServer, tmp_path: Path, case: str
):
    path = pulled(f"{GGUF}:F16")
    (tmp_path / "precious").write_text("mine")
    record = path.with_name(f"{path.name}.keelback.json")
    values = json.loads(record.read_text())
    BAD_RECORDS[case](values)
    record.write_text(json.dumps(values))
    assert Store().listing() == [] and locate_fails(GGUF)
    with pytest.raises(InvalidInput, match="nothing"):
        Store().discard(GGUF)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_that_is_cut_short_is_not_there(server: HubServer):
    path = pulled(f"{GGUF}:F16")
    path.write_bytes(path.read_bytes()[:-1])
    assert Store().listing() == [] and locate_fails(GGUF)
    assert pulled(f"{GGUF}:F16").read_bytes() == server.repos[GGUF]["mamba-F16.gguf"]
