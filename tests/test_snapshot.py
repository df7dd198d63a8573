"""Snapshots: a generation that is saved and taken up elsewhere goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import keelback
from keelback.engine import snapshot as snapshots
from keelback.kernels import files

PROMPT = "To be, or not to be"
AFTER = 100

# One process's part of a generation: go on from a snapshot or start, write `count` tokens, save.
SCRIPT = """
import json, sys
import keelback

job = json.loads(sys.argv[1])
model = keelback.load("demo", threads=job["threads"])
if job["load"]:
    session = keelback.Session.resume(model, keelback.Snapshot.load(job["load"], model))
else:
    settings = {**job["settings"], "logit_bias": {int(k): v for k, v in job["bias"].items()}}
    session = keelback.Session(model, stop=job["stop"], **settings)
    session.feed(job["prompt"])
pieces, states = [], []
for _ in range(job["count"]):
    pieces.append("".join(session.generate(1)))
    states.append([session.stream.held, session.stream.undecoded.hex(), session.pending])
if job["save"]:
    session.snapshot().save(job["save"])
block = session.state.block.tobytes().hex()
print(json.dumps({"pieces": pieces, "states": states, "block": block}))
"""


def process(**job) -> dict:
    text = json.dumps(job)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, text], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_killed_generation_continues_identically_in_a_new_process(
    tmp_path: Path, demo: keelback.Model
):
    def byte_id(value: int) -> int:
        return (
            demo.tokenizer.encode(bytes([value]).decode("latin-1"), add_special=False)[-1]
            if value < 128
            else (
                next(i for i in range(demo.vocabulary) if demo.tokenizer.piece(i) == bytes([value]))
            )
        )

    start = {
        "prompt": PROMPT,
        "stop": ["é" * 40, "never"],
        "settings": {
            "temperature": 0.9, "repeat_penalty": 1.05, "presence_penalty": 0.1,
            "frequency_penalty": 0.05, "seed": 7,
        },
        "bias": {str(byte_id(0xC3)): 24.0, str(byte_id(0xA9)): 24.0},
        "threads": 2,
    }  # fmt: skip
    whole = process(**start, load=None, save=None, count=60 + AFTER)
    # A point where a stop string is half matched and a character half there.
    cut = next(
        i for i, (held, undecoded, _) in enumerate(whole["states"][:60], 1) if held and undecoded
    )
    saved = str(tmp_path / "half.safetensors")
    first = process(**start, load=None, save=saved, count=cut)
    rest = process(load=saved, save=None, count=60 + AFTER - cut, threads=1)
    assert first["pieces"] + rest["pieces"] == whole["pieces"]
    assert first["states"] + rest["states"] == whole["states"]
    assert rest["block"] == whole["block"]
    assert len(rest["pieces"]) >= AFTER


def test_a_state_alone_is_saved_and_loaded(tmp_path: Path, demo: keelback.Model):
    ids = demo.tokenizer.encode(PROMPT)
    logits, state = demo.forward(ids)
    state.save(tmp_path / "state.safetensors")
    loaded = keelback.State.load(tmp_path / "state.safetensors", demo)
    assert loaded.position == len(ids) and loaded.digest == state.digest
    assert (loaded.block == state.block).all() and (loaded.logits == logits).all()
    assert (demo.forward(ids, loaded)[0] == demo.forward(ids, state)[0]).all()


def test_snapshots_know_their_parents(tmp_path: Path, demo: keelback.Model):
    session = keelback.Session(demo, seed=1)
    session.feed(PROMPT)
    first = session.snapshot("the beginning").save(tmp_path / "first")
    resumed = keelback.Session.resume(demo, keelback.Snapshot.load(tmp_path / "first", demo))
    resumed.next_token()
    second = resumed.snapshot().save(tmp_path / "second")
    assert keelback.Snapshot.load(tmp_path / "second", demo).parent == first.id != second.id
    assert keelback.Snapshot.load(tmp_path / "first", demo).note == "the beginning"


def test_settings_given_on_resuming_win_over_the_saved_ones(tmp_path: Path, demo: keelback.Model):
    session = keelback.Session(demo, temperature=0.9, seed=3)
    session.feed(PROMPT)
    session.snapshot().save(tmp_path / "s")
    snapshot = keelback.Snapshot.load(tmp_path / "s", demo)
    resumed = keelback.Session.resume(demo, snapshot, seed=4)
    assert (resumed.sampling.seed, resumed.sampling.temperature) == (4, 0.9)


def test_settings_may_be_numpys_numbers(tmp_path: Path, demo: keelback.Model):
    numbers = {
        "repeat_last_n": np.int64(8), "top_k": np.int32(5), "seed": np.uint64(1 << 63),
        "temperature": np.float32(0.5), "logit_bias": {np.int64(7): np.float32(0.25)},
    }  # fmt: skip
    session = keelback.Session(demo, keelback.Sampling(**numbers))
    session.feed(PROMPT)
    session.next_token()
    session.snapshot().save(tmp_path / "s")
    plain = dict(repeat_last_n=8, top_k=5, seed=1 << 63, temperature=0.5, logit_bias={7: 0.25})
    kept = keelback.Snapshot.load(tmp_path / "s", demo).conversation.sampling
    assert kept == session.sampling == keelback.Sampling(**plain)


def test_a_snapshot_is_a_place_to_go_on_from_more_than_once(demo: keelback.Model):
    session = keelback.Session(demo, seed=1)
    session.feed(PROMPT)
    snapshot = session.snapshot()
    first, second = (keelback.Session.resume(demo, snapshot) for _ in range(2))
    assert "".join(first.generate(20)) == "".join(second.generate(20))
    assert first.state.block.tobytes() == second.state.block.tobytes()
    assert snapshot.state.position == len(demo.tokenizer.encode(PROMPT))


@pytest.fixture
def saved(tmp_path: Path, demo: keelback.Model) -> Path:
    session = keelback.Session(demo, seed=1)
    session.feed(PROMPT)
    session.snapshot().save(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def test_a_flipped_byte_is_found_wherever_it_lies(saved: Path, demo: keelback.Model):
    content = saved.read_bytes()
    for at in np.random.RandomState(0).choice(len(content), 60, replace=False):
        broken = bytearray(content)
        broken[at] ^= 0x10
        saved.write_bytes(broken)
        with pytest.raises(keelback.InvalidFile, match=r"saved\.safetensors"):
            keelback.Snapshot.load(saved, demo)


def test_a_truncated_snapshot_is_refused(saved: Path, demo: keelback.Model):
    content = saved.read_bytes()
    for length in (0, 4, 9, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(keelback.InvalidFile):
            keelback.Snapshot.load(saved, demo)


def test_another_models_snapshot_is_refused(saved: Path, tiny_model):
    with pytest.raises(keelback.InvalidFile, match="another model"):
        keelback.Snapshot.load(saved, tiny_model("mamba-tied", "f32"))


def test_an_older_format_is_refused(
    tmp_path: Path, demo: keelback.Model, monkeypatch: pytest.MonkeyPatch
):
    session = keelback.Session(demo)
    session.feed(PROMPT)
    monkeypatch.setattr(snapshots, "VERSION", 0)
    session.snapshot().save(tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(keelback.InvalidFile, match="format '0'"):
        keelback.Snapshot.load(tmp_path / "old", demo)


def test_other_numerics_go_on_and_say_so(saved: Path):
    said: list[str] = []
    model = keelback.Model("demo", backend="numpy", notice=said.append)
    session = keelback.Session.resume(model, keelback.Snapshot.load(saved, model))
    session.next_token()
    assert any("not bit for bit" in text for text in said)


def test_a_snapshot_with_ids_out_of_range_is_refused(tmp_path: Path, demo: keelback.Model):
    session = keelback.Session(demo)
    session.feed(PROMPT)
    snapshot = session.snapshot()
    conversation = replace(snapshot.conversation, pending=demo.vocabulary)
    replace(snapshot, conversation=conversation).save(tmp_path / "odd")
    with pytest.raises(keelback.InvalidFile, match="out of range"):
        keelback.Snapshot.load(tmp_path / "odd", demo)


def test_a_failed_save_leaves_the_older_file(saved: Path, demo: keelback.Model, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    session = keelback.Session(demo)
    session.feed("Other")
    with pytest.raises(keelback.InvalidInput, match="No space left"):
        session.snapshot().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1}, {"position": 1 << 63}, {"position": 1e300}, {"position": None},
        {"digest": "x"}, {"parent": 5}, {"conversation": []}, {"numerics": {}}, {"note": 1},
        {"conversation.held": 5}, {"conversation.stop": [1]}, {"conversation.undecoded": "zz"},
        {"conversation.pending": 1.5}, {"conversation.sampling": "x"},
        {"conversation.sampling": {"logit_bias": []}},
        {"conversation.sampling": {"logit_bias": {"x": 1}}},
        {"conversation.sampling": {"logit_bias": {}, "top_k": 1.5}},
    ],
)  # fmt: skip
def test_a_well_sealed_snapshot_of_nonsense_gets_a_sentence(saved, demo, monkeypatch, change):
    """The checksum is no signature: anyone can make one that fits."""
    honest = snapshots.Snapshot._facts

    def nonsense(self) -> str:
        facts = json.loads(honest(self))
        for path, value in change.items():
            *parents, key = path.split(".")
            inside = facts
            for parent in parents:
                inside = inside[parent]
            inside[key] = value
        return json.dumps(facts)

    monkeypatch.setattr(snapshots.Snapshot, "_facts", nonsense)
    keelback.Snapshot.load(saved, demo).save(saved)
    monkeypatch.undo()
    with pytest.raises(keelback.InvalidFile, match=r"saved\.safetensors"):
        keelback.Snapshot.load(saved, demo)


@pytest.mark.parametrize("recent", [np.array(3), np.zeros((2, 2), np.int64), np.zeros(2)])
def test_last_tokens_of_another_shape_get_a_sentence(saved, demo, monkeypatch, recent):
    honest = snapshots.Snapshot._tensors
    monkeypatch.setattr(
        snapshots.Snapshot, "_tensors", lambda self: {**honest(self), "recent": recent}
    )
    keelback.Snapshot.load(saved, demo).save(saved)
    with pytest.raises(keelback.InvalidFile, match="a tensor is"):
        keelback.Snapshot.load(saved, demo)


def test_a_notice_about_other_numerics_is_short(saved: Path):
    said: list[str] = []
    model = keelback.Model("demo", notice=said.append)
    snapshot = keelback.Snapshot.load(saved, model)
    replace(snapshot, state=replace(snapshot.state, numerics="x" * 100_000)).save(saved)
    keelback.Snapshot.load(saved, model)
    assert len(said) == 1 and len(said[0]) < 600


def claim(path: Path, header: dict, size: int = 0, length: int | None = None) -> None:
    """A file with that header which says that it has `size` bytes, and takes none of them."""
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write((length or len(text)).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def claimed(**tensors: tuple[str, list[int], int]) -> dict:
    """A header of tensors: name -> (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header


def test_what_a_file_claims_is_checked_before_memory_is_taken(tmp_path: Path, tiny_model):
    model, path = tiny_model("granite-dense", "f32", "numpy"), tmp_path / "hostile"
    cache = model.layout.caches[0]
    rows = (256 << 30) // (cache.ref.heads * cache.row_bytes)

    def metadata(position: int) -> dict:
        types = {"k": "f32", "v": "f32"}
        facts = json.dumps({"model": model.fingerprint, "position": position, "cache_types": types})
        return {"__metadata__": {"format": "keelback-snapshot", "version": "3", "facts": facts}}

    whole = {
        f"state.{held.ref.name}": ("F32", list(held.ref.shape), held.nbytes)
        for held in model.layout.states
    }
    for at in model.layout.caches:
        shape = [rows, at.ref.heads, at.row_bytes]
        whole[f"cache.{at.ref.name}"] = ("U8", shape, math.prod(shape))
    whole["recent"] = ("I64", [0], 0)
    size = sum(nbytes for _, _, nbytes in whole.values())
    many = {f"n{i}": ("F32", [0], 0) for i in range(100_000)}
    recent = {**whole, "recent": ("I64", [1 << 33], 8 << 33)}
    cases = [
        (dict(header={}, length=1 << 60), "header is too large"),
        (dict(header={}, length=17 << 20), "header is too large"),
        (dict(header={"x": []}), "is no saved state of keelback"),
        (dict(header=claimed(x=("F32", [1 << 58], 1 << 60))), "is no saved state of keelback"),
        (dict(header=metadata(1 << 47) | claimed(**whole), size=size), "a tensor is U8"),
        (dict(header=metadata(rows) | claimed(**whole), size=size), "than fits into memory"),
        (dict(header=metadata(0) | claimed(**many)), "lacks the tensor"),
        (dict(header=metadata(rows) | claimed(**recent), size=size + (8 << 33)), "a tensor is I64"),
    ]  # fmt: skip
    for given, said in cases:
        claim(path, **given)
        with pytest.raises(keelback.InvalidFile, match=said) as caught:
            keelback.Snapshot.load(path, model)
        assert str(path) in str(caught.value)
    deep = metadata(0)
    deep["__metadata__"]["facts"] = "[" * 100_000
    claim(path, deep)
    with pytest.raises(keelback.InvalidFile, match="does not describe a snapshot"):
        keelback.Snapshot.load(path, model)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(keelback.InvalidFile, match="no ordinary file"):
        keelback.Snapshot.load(path, model)


def test_a_damaged_state_is_neither_saved_nor_loaded(saved: Path, demo: keelback.Model):
    before = saved.read_bytes()
    state = keelback.State.load(saved, demo)
    state.damaged = True
    with pytest.raises(keelback.InvalidInput, match="is not written"):
        state.save(saved)
    assert saved.read_bytes() == before
    state.damaged = False
    next(iter(state.tensors().values())).flat[7] = np.nan
    state.save(saved)
    with pytest.raises(keelback.InvalidFile, match="not finite"):
        keelback.State.load(saved, demo)


def test_threads_that_save_into_one_folder_do_not_mix_their_files(tmp_path: Path, demo):
    states = {name: demo.forward([7] * count)[1] for count, name in enumerate("ab", 1)}

    def save(name: str) -> None:
        for _ in range(40):
            states[name].save(tmp_path / name)

    threads = [threading.Thread(target=save, args=(name,)) for name in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, state in states.items():
        assert keelback.State.load(tmp_path / name, demo).position == state.position
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
