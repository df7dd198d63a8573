"""Models in several files: read as one, made from one, put together again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import keelback
from keelback import models
from keelback.cli import main
from keelback.convert.edit import merge, split, stored
from keelback.engine.model import Model
from keelback.kernels.formats.gguf import GGUF
from keelback.kernels.formats.gguf_writer import write_file
from keelback.kernels.formats.metadata import Value

COUNT = 3


def split_by_hand(source: Path, folder: Path, first_empty: bool = False) -> list[Path]:
    """What gguf-split writes, its `--no-tensor-first-split` where the first part is to be empty."""
    file = GGUF(source)
    infos = list(file.tensors.values())
    groups = [infos[0::2], infos[1::2]]
    groups.insert(0, [])
    if not first_empty:
        groups[0] = [groups[1].pop()]
    paths = []
    for index, group in enumerate(groups):
        entries = {} if index else dict(file.metadata.entries)
        entries["split.no"] = Value.of(index, "u16")
        entries["split.count"] = Value.of(COUNT, "u16")
        entries["split.tensors.count"] = Value.of(len(infos), "i32")
        paths.append(folder / f"model-{index + 1:05d}-of-{COUNT:05d}.gguf")
        write_file(paths[-1], entries, stored(file, group), lambda done, total: None)
    return paths


@pytest.fixture(scope="module")
def source(tiny_file) -> Path:
    return tiny_file("mamba2-g2", "f32")


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> list[Path]:
    return split_by_hand(source, tmp_path)


@pytest.mark.parametrize("first_empty", [False, True])
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_parts_make_the_same_logits_as_the_whole(
    tiny_file, tmp_path: Path, outtype: str, first_empty: bool
):
    source = tiny_file("mamba-q8", outtype)
    first = split_by_hand(source, tmp_path, first_empty)[0]
    whole = keelback.load(source)
    for repack in (True, False):
        model = Model(first, notice=lambda text: None, repack=repack)
        assert (model.forward([1, 2, 3])[0] == whole.forward([1, 2, 3])[0]).all()


def test_every_command_takes_the_first_part(tmp_path: Path):
    first = str(split(models.DEMO, str(tmp_path / "demo"), max_tensors=20)[0])
    run = CliRunner().invoke
    whole = run(main, ["run", "demo", "It was the", "-n", "5", "--temp", "0"])
    assert run(main, ["run", first, "It was the", "-n", "5", "--temp", "0"]).stdout == whole.stdout
    ids = run(main, ["tokenize", first, "It was the", "--ids"]).stdout
    assert json.loads(ids) == [1, 610, 373, 265]
    facts = json.loads(run(main, ["info", first, "--json"]).stdout)
    bytes_of_all = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert facts["parameters"] == 4_681_832 and facts["file_bytes"] == bytes_of_all
    assert facts["parts"] == 4
    planned = json.loads(run(main, ["plan", first, "--json"]).stdout)
    assert planned["file_bytes"] == bytes_of_all
    rows = run(main, ["bench", first, "-p", "4", "-n", "1", "-r", "1", "-t", "1", "-o", "json"])
    assert [row["model_n_params"] for row in json.loads(rows.stdout)] == [4_681_832] * 2


def second(key: str, value: int, place: int = 1) -> Callable[[list[Path]], None]:
    """Puts the second part, with a number of it changed, into some part's place."""

    def change(parts: list[Path]) -> None:
        content = bytearray(parts[1].read_bytes())
        content[content.index(key.encode()) + len(key) + 4] = value
        parts[place].write_bytes(content)

    return change


BROKEN: dict[str, tuple[Callable[[list[Path]], object], int, str]] = {
    "a missing part": (lambda parts: parts[1].unlink(), 1, "is missing, one of 3 parts"),
    "a part twice": (
        lambda parts: shutil.copy(parts[1], parts[2]), 2, "its split.no is 1, not 2"),
    "a part of another splitting": (second("split.count", 9), 1, "its split.count is 9, not 3"),
    "a part of another model": (
        second("split.tensors.count", 99), 1, "its split.tensors.count is 99, not"),
    "the same tensors twice": (second("split.no", 2, 2), 2, "holds the tensor"),
    "a damaged part": (lambda parts: parts[2].write_bytes(b"GGUF"), 2, "in the middle of its hea"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit_are_named(parts: list[Path], case: str):
    spoil, index, said = BROKEN[case]
    spoil(parts)
    with pytest.raises(keelback.InvalidFile, match=said) as caught:
        keelback.load(parts[0])
    assert str(caught.value).startswith(str(parts[index]))


def test_a_total_that_is_no_total_is_refused(source: Path, tmp_path: Path):
    parts = split_by_hand(source, tmp_path)
    for path in parts:
        content = path.read_bytes()
        at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
        path.write_bytes(content[:at] + b"\x63" + content[at + 1 :])
    with pytest.raises(keelback.InvalidFile, match="announces 99 tensors in 3 parts"):
        GGUF(parts[0])


def test_a_part_by_itself_says_which_is_the_first(parts: list[Path]):
    with pytest.raises(keelback.InvalidFile, match=r"is part 2 of 3; name the first, .*00001-of"):
        GGUF(parts[1])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(keelback.InvalidFile, match=r"let it end in -00001-of-00003\.gguf"):
        GGUF(renamed)


@pytest.mark.parametrize("value", [(-1, "i32"), (3, "u16"), ("1", "str"), ([0, 1], "arr[u16]")])
def test_a_number_that_is_none_is_refused(parts: list[Path], value: tuple[object, str]):
    entries = {**GGUF(parts[0]).metadata.entries, "split.no": Value.of(*value)}
    write_file(parts[0].with_name("other.gguf"), entries, [], lambda done, total: None)
    parts[0].with_name("other.gguf").replace(parts[0])
    with pytest.raises(keelback.InvalidFile, match=r"calls itself part .* of 3, counted from 0"):
        GGUF(parts[0])


def test_split_by_size_keeps_to_it_and_gives_a_large_tensor_its_own_part(
    source: Path, tmp_path: Path
):
    file, limit = GGUF(source), 20_000
    paths = split(source, str(tmp_path / "x"), max_size="20K")
    sizes = []
    for index, path in enumerate(paths):
        assert path.name == f"x-{index + 1:05d}-of-{len(paths):05d}.gguf"
        part = GGUF(paths[0]).parts[index]
        sizes.append([info.nbytes for info in part.tensors.values()])
        assert set(part.metadata) == {
            "split.no", "split.count", "split.tensors.count", *(() if index else file.metadata)
        }  # fmt: skip
        kinds = [part.metadata.entries[f"split.{key}"].kind for key in ("no", "count")]
        assert kinds == ["u16"] * 2
    assert all(sum(part) <= limit or len(part) == 1 for part in sizes)
    assert any(sum(part) > limit for part in sizes) and all(sizes)
    # No part could have taken the next one's first tensor as well.
    assert all(sum(a) + b[0] > limit - 32 * len(a) for a, b in pairwise(sizes))


def test_split_and_merge_give_the_file_back(source: Path, tmp_path: Path):
    parts = split(source, str(tmp_path / "x"), max_tensors=7)
    assert len(parts) > 2 and [len(part.tensors) for part in GGUF(parts[0]).parts][:2] == [7, 7]
    whole = merge(parts[0], tmp_path / "whole.gguf")
    assert whole.read_bytes() == source.read_bytes()
    # Parts can be split anew, in other sizes.
    again = split(parts[0], str(tmp_path / "y"), max_tensors=1000)
    assert [path.name for path in again] == ["y-00001-of-00001.gguf"]
    assert merge(again[0], tmp_path / "z.gguf").read_bytes() == source.read_bytes()


def test_outputs_that_would_destroy_what_is_read_are_refused(source: Path, tmp_path: Path):
    parts = split(source, str(tmp_path / "x"), max_tensors=7)
    before = [path.read_bytes() for path in parts]
    link = tmp_path / "link.gguf"
    link.symlink_to(parts[1])
    for target in (parts[0], parts[1], link):
        with pytest.raises(keelback.InvalidInput, match="is read here"):
            merge(parts[0], target)
    with pytest.raises(keelback.InvalidInput, match="is read here"):
        split(parts[0], str(tmp_path / "x"), max_tensors=7)
    with pytest.raises(keelback.InvalidInput, match="nothing to merge"):
        merge(source, tmp_path / "new.gguf")
    assert [path.read_bytes() for path in parts] == before
    assert len(list(tmp_path.iterdir())) == len(parts) + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_size": "0"}, "'0' is no size"),
        ({"max_size": "2 G"}, "'2 G' is no size"),
        ({"max_size": "1M", "max_tensors": 2}, "not by both"),
        ({"max_tensors": 0}, "give at least 1"),
    ],
)
def test_options_of_split_that_cannot_be_meant(
    source: Path, tmp_path: Path, options: dict, said: str
):
    with pytest.raises(keelback.InvalidInput, match=said):
        split(source, str(tmp_path / "x"), **options)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_split_leaves_nothing_and_an_old_one_whole(source: Path, tmp_path: Path):
    paths = split(source, str(tmp_path / "x"), max_tensors=7)
    before = {path: path.read_bytes() for path in paths}

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(source, str(tmp_path / "x"), max_tensors=7, progress=interrupt)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_progress_ends_at_the_bytes_of_all_tensors(source: Path, tmp_path: Path):
    told: list[tuple[int, int]] = []
    paths = split(source, str(tmp_path / "x"), None, 7, lambda *step: told.append(step))
    total = sum(info.nbytes for info in GGUF(source).tensors.values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total) and {of for _, of in told} == {total}
    told.clear()
    merge(paths[0], tmp_path / "whole.gguf", lambda *step: told.append(step))
    assert told[-1] == (total, total)


def test_a_part_gives_the_memory_of_its_own_pages_back(parts: list[Path]):
    file = GGUF(parts[0])
    values = {name: file.data(info).copy() for name, info in file.tensors.items()}
    for info in file.tensors.values():
        file.release(info)
    file.release_all()
    assert all(np.array_equal(file.data(file.tensors[name]), old) for name, old in values.items())
