"""Pulling models: against a local server that plays the hub, and that misbehaves on demand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

import tiny
from hubserver import HubServer, commit
from keelback.convert import convert, hub, pull
from keelback.convert.pull import Wanted, locate
from keelback.convert.store import Store
from keelback.kernels.errors import InvalidFile, InvalidInput, KeelbackError, UnsupportedModel

CHECKPOINT, GGUF = "user/mamba-tied", "user/mamba-GGUF"
CONVERTED, LARGE = "mamba-tied-F32.gguf", "model.safetensors"
NEVER = {"modeling.py": b"import os", "pytorch_model.bin": b"x" * 300, "README.md": b"#"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory, tiny_file) -> dict[str, dict[str, bytes]]:
    """A repository with a checkpoint, and one with GGUF files."""
    folder = tiny.write_checkpoint("mamba-tied", tmp_path_factory.mktemp("hub") / "mamba-tied")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    models = {
        f"mamba-{kind.upper()}.gguf": tiny_file("mamba-q8", kind).read_bytes()
        for kind in ("q8_0", "f16")
    }
    split = {f"x-Q2_K-0000{i}-of-00002.gguf": bytes([i]) * 300 for i in (1, 2)}
    return {CHECKPOINT: files | NEVER, GGUF: models | split | {"mmproj-F16.gguf": b"p" * 300}}


@pytest.fixture
def server(contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, as the only hub there is; nothing of the user's is read or written."""
    for name in [name for name in os.environ if name.startswith("HF_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    played = HubServer()
    played.repos = {repo: dict(files) for repo, files in contents.items()}
    template = f"{played.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", played.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("HF_ENDPOINT", played.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KEELBACK_MODELS", str(tmp_path / "models"))
    close_session()
    yield played
    close_session()
    played.close()


def pulled(name: str, *, notes: list[str] | None = None, **options) -> Path:
    return pull.pull(Wanted(name, **options), (notes if notes is not None else []).append)


def files_in(folder: Path) -> set[str]:
    """Files of a folder, but the locks."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith(".locks/")}


def test_a_checkpoint_is_downloaded_converted_and_dropped(server: HubServer, tmp_path: Path):
    notes: list[str] = []
    path = pulled(CHECKPOINT, notes=notes)
    assert path == tmp_path / "models" / CHECKPOINT / CONVERTED
    assert files_in(tmp_path / "models") == {
        f"{CHECKPOINT}/{CONVERTED}",
        f"{CHECKPOINT}/{CONVERTED}.keelback.json",
    }
    assert sorted(server.downloads()) == ["config.json", LARGE]
    assert any("removed again" in note for note in notes)
    local = tmp_path / "mamba-tied"
    local.mkdir()
    for name in ("config.json", LARGE):
        (local / name).write_bytes(server.repos[CHECKPOINT][name])
    assert convert(local, tmp_path / "local.gguf").read_bytes() == path.read_bytes()


def test_what_is_there_is_not_downloaded_again(server: HubServer):
    for name in (CHECKPOINT, f"{GGUF}:q8_0"):
        path = pulled(name)
        server.requests.clear()
        notes: list[str] = []
        assert pulled(name, notes=notes) == path and server.downloads() == []
        assert "is there already" in notes[0]


def test_a_kept_checkpoint_is_converted_again_without_a_download(server: HubServer):
    pulled(CHECKPOINT, keep=True)
    assert [row["name"] for row in Store().listing()] == [f"{CHECKPOINT}:{t}" for t in
                                                         ("F32", "checkpoint")]  # fmt: skip
    server.requests.clear()
    path = pulled(f"{CHECKPOINT}:Q8_0", keep=True)
    assert path.name == "mamba-tied-Q8_0.gguf" and server.downloads() == []
    assert Store().discard(f"{CHECKPOINT}:checkpoint") == [f"{CHECKPOINT}:checkpoint"]
    assert not (path.parent / "mamba-tied").exists() and path.exists()


def test_a_new_revision_replaces_the_old_one(server: HubServer):
    path = pulled(f"{GGUF}:Q8_0")
    server.repos[GGUF]["mamba-Q8_0.gguf"] = b"newer" * 100
    assert pulled(f"{GGUF}:Q8_0") == path and path.read_bytes() == b"newer" * 100
    assert [row["revision"] for row in Store().listing()] == [commit(server.repos[GGUF])]


def test_gguf_files_are_chosen_by_tag_file_and_default(server: HubServer):
    assert pulled(GGUF).name == "mamba-Q8_0.gguf"
    assert pulled(f"{GGUF}:f16").name == "mamba-F16.gguf"
    server.requests.clear()
    path = pulled(f"{GGUF}:Q2_K")
    assert path.name == "x-Q2_K-00001-of-00002.gguf"
    assert server.downloads() == [f"x-Q2_K-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert {p.name for p in path.parent.glob("x-*.gguf")} == set(server.downloads())
    assert pulled(GGUF, file="MAMBA-f16.gguf").name == "mamba-F16.gguf"
    with pytest.raises(InvalidInput, match="it has F16, Q8_0, Q2_K"):
        pulled(f"{GGUF}:Q5_K_M")


def test_outtype_asks_for_the_checkpoint_beside_gguf_files(server: HubServer):
    server.repos[CHECKPOINT]["mamba-Q8_0.gguf"] = b"g" * 300
    assert pulled(CHECKPOINT).name == "mamba-Q8_0.gguf"
    assert pulled(CHECKPOINT, outtype="f16").name == "mamba-tied-F16.gguf"
    with pytest.raises(InvalidInput, match="not two of them"):
        pulled(f"{CHECKPOINT}:Q8_0", outtype="f16")


def test_a_tag_that_a_checkpoint_cannot_have_gets_a_sentence(server: HubServer):
    with pytest.raises(InvalidInput, match="f32, f16, bf16, q8_0"):
        pulled(f"{CHECKPOINT}:IQ1_S")
    with pytest.raises(InvalidInput, match="no GGUF files"):
        pulled(CHECKPOINT, file="a.gguf")
    assert server.downloads() == []


def test_hostile_names_touch_nothing_outside_the_store(server: HubServer, tmp_path: Path):
    names = ["../../../evil-Q8_0.gguf", "/evil-Q8_0.gguf", "a/../../evil-Q8_0.gguf", "..", "x/.."]
    server.repos["user/evil"] = {name: b"e" * 300 for name in names}
    with pytest.raises(UnsupportedModel, match="no weights that can be read"):
        pulled("user/evil")
    server.repos[CHECKPOINT] |= {name: b"e" * 300 for name in ("../config.json", "a\\b.bin")}
    pulled(CHECKPOINT)
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
    assert all(name.startswith(CHECKPOINT) for name in files_in(tmp_path / "models"))


@pytest.mark.parametrize("faults", [["drop"], ["500", "drop", "500"], ["416"], ["drop", "whole"]])
def test_a_passing_fault_is_passed_over(server: HubServer, faults: list[str]):
    server.faults["mamba-Q8_0.gguf"] = faults
    content = server.repos[GGUF]["mamba-Q8_0.gguf"]
    assert pulled(GGUF).read_bytes() == content and not faults


def test_a_dropped_connection_goes_on_where_it_broke_off(server: HubServer):
    size = len(server.repos[GGUF]["mamba-Q8_0.gguf"])
    server.faults["mamba-Q8_0.gguf"] = ["drop", "drop"]
    pulled(GGUF)
    ranges = [headers.get("range") for path, headers in server.requests if "/lfs/" in path]
    assert ranges == [None, f"bytes={size // 2}-", f"bytes={size - size // 4}-"]


def test_a_pull_that_failed_is_resumed_by_the_next_one(server: HubServer):
    size = len(server.repos[CHECKPOINT][LARGE])
    server.faults[LARGE] = ["drop", "500", "500", "500"]
    with pytest.raises(InvalidInput, match="the hub answers 500"):
        pulled(CHECKPOINT)
    assert Store().unfinished()[CHECKPOINT] > size // 2
    assert Store().present() == [] and locate_fails(CHECKPOINT)
    server.requests.clear()
    pulled(CHECKPOINT)
    assert server.downloads() == [LARGE]
    assert server.requests[-1][1]["range"] == f"bytes={size // 2}-"
    assert Store().unfinished() == {}


def test_a_partial_file_that_is_wrong_is_replaced(server: HubServer):
    server.faults["mamba-Q8_0.gguf"] = ["drop", "500", "500", "500"]
    with pytest.raises(InvalidInput):
        pulled(GGUF)
    (partial,) = Store().downloads(GGUF).iterdir()
    partial.write_bytes(b"?" * partial.stat().st_size)
    assert pulled(GGUF).read_bytes() == server.repos[GGUF]["mamba-Q8_0.gguf"]


def locate_fails(name: str) -> bool:
    with pytest.raises(InvalidInput, match="has not been pulled"):
        locate(Wanted(name), offline=True)
    return True


LASTING = {
    "flip": (InvalidFile, "another checksum"),
    "long": (InvalidFile, "does not send the"),
    "short": (InvalidFile, "does not send the"),
    "html": (InvalidFile, "does not send the"),
    "500": (InvalidInput, "answers 500; try again later"),
    "loop": (InvalidFile, "does not answer as the hub does"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_gets_one_sentence(server: HubServer, tmp_path: Path, fault: str):
    # A redirect is followed some 20 times in each attempt.
    server.faults["mamba-Q8_0.gguf"] = faults = [fault] * 100
    kind, said = LASTING[fault]
    with pytest.raises(kind, match=said) as raised:
        pulled(GGUF)
    assert "\n" not in str(raised.value)
    assert all("/.download/" in name for name in files_in(tmp_path / "models"))
    faults.clear()
    assert pulled(GGUF).read_bytes() == server.repos[GGUF]["mamba-Q8_0.gguf"]


def test_refusals_of_the_hub_get_one_sentence(server: HubServer):
    with pytest.raises(InvalidInput, match=r"user/none is not there, or is private.*--hf-token"):
        pulled("user/none")
    with pytest.raises(InvalidInput, match="has no such revision"):
        pulled(GGUF, revision="nowhere/../x")
    server.listing = lambda entry: entry | {"sha": "a" * 40}
    with pytest.raises(InvalidInput, match="was changed while it was being pulled"):
        pulled(GGUF)
    server.listing = lambda entry: entry
    server.tokens[GGUF] = "hf_right"
    with pytest.raises(InvalidInput, match=r"gated.*accept its terms at http.*HF_TOKEN"):
        pulled(GGUF)
    with pytest.raises(InvalidInput, match="gated"):
        pulled(GGUF, token="hf_wrong")
    with pytest.raises(InvalidInput, match="characters that no token") as raised:
        pulled(GGUF, token="hf_right\r\nX: y")
    assert "hf_right" not in str(raised.value)
    pulled(GGUF, token="hf_right")


def test_a_token_does_not_go_to_another_host(server: HubServer):
    server.tokens[GGUF] = "hf_right"
    pulled(GGUF, token="hf_right")
    sent = [(path, headers.get("authorization")) for path, headers in server.requests]
    assert [held for path, held in sent if "/resolve/" in path] == ["Bearer hf_right"]
    assert [held for path, held in sent if "/lfs/" in path] == [None]


ODD = {
    "HTML": lambda entry: b"<html>log in</html>",
    "a list": lambda entry: [entry],
    "nothing": lambda entry: {},
    "no commit": lambda entry: entry | {"sha": "../../x"},
    "files without names": lambda entry: entry | {"siblings": [{"size": 3}]},
    "nested lists": lambda entry: b"[" * 200_000,
}


@pytest.mark.parametrize("case", ODD)
def test_an_answer_that_is_not_the_hubs_gets_one_sentence(server: HubServer, case: str):
    server.listing = ODD[case]
    with pytest.raises(InvalidFile, match="does not answer as the hub does; check HF_ENDPOINT"):
        pulled(GGUF)


def test_files_without_size_or_checksum_are_not_taken(server: HubServer):
    def without(entry: dict) -> dict:
        return entry | {"siblings": [{"rfilename": s["rfilename"]} for s in entry["siblings"]]}

    server.listing = without
    with pytest.raises(UnsupportedModel, match="no weights"):
        pulled(GGUF)


def test_without_a_network_what_is_there_still_runs(server: HubServer):
    path = pulled(f"{GGUF}:F16")
    server.close()
    close_session()
    for name in (GGUF, f"{GGUF}:f16"):
        assert locate(Wanted(name)) == path
    assert locate(Wanted(GGUF, file="mamba-f16.gguf")) == path
    with pytest.raises(InvalidInput, match="has not been pulled; leave --offline out"):
        locate(Wanted(f"{GGUF}:Q8_0"), offline=True)
    with pytest.raises(InvalidInput, match="cannot be reached or breaks off"):
        locate(Wanted(f"{GGUF}:Q8_0"))


@pytest.mark.parametrize("endpoint", ["http://[::1", "ftp://x", "nonsense", "http://127.0.0.1:1"])
def test_an_endpoint_that_is_none_gets_a_sentence(server: HubServer, monkeypatch, endpoint: str):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(KeelbackError, match=re.escape(endpoint)):
        pulled(GGUF)


def test_offline_mode_of_huggingface_hub_is_heeded(server: HubServer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(InvalidInput, match="HF_HUB_OFFLINE"):
        pulled(GGUF)
    assert server.requests == []


def test_files_of_huggingface_hubs_cache_are_taken_from_there(server: HubServer, tmp_path: Path):
    files = server.repos[CHECKPOINT]
    folder = tmp_path / "hf" / "hub" / "models--user--mamba-tied" / "snapshots" / commit(files)
    blobs = folder.parent.parent / "blobs"
    for path in (folder, blobs):
        path.mkdir(parents=True)
    (blobs / "a").write_bytes(files[LARGE])
    (folder / LARGE).symlink_to("../../blobs/a")
    (folder / "config.json").write_bytes(b"damaged")
    original = pulled(CHECKPOINT, keep=True).with_name("mamba-tied") / LARGE
    assert server.downloads() == ["config.json"]
    assert original.samefile(blobs / "a") and not original.is_symlink()
    Store().discard(CHECKPOINT)
    assert (blobs / "a").read_bytes() == files[LARGE]


def test_a_model_type_that_is_not_known_costs_no_weights(server: HubServer):
    files = server.repos[CHECKPOINT]
    for config, said in (
        (b'{"model_type": "llama"}', "llama is a transformer"),
        (b'{"model_type": "new", "llm_config": {}}', "'new' is not known; keelback converts "),
        (b'{"model_type": "some_vl", "llm_config": {"model_type": "gpt2"}}', "gpt2 is a transfo"),
    ):
        files["config.json"] = config
        with pytest.raises(UnsupportedModel, match=f"{CHECKPOINT}/config.json: .*{said}"):
            pulled(CHECKPOINT)
    assert LARGE not in server.downloads()


def test_a_wrapped_model_is_pulled_as_it_is_converted(server: HubServer):
    theirs = json.loads(server.repos[CHECKPOINT]["config.json"])
    wrapped = {"model_type": "some_vl", "language_config": theirs}
    server.repos[CHECKPOINT]["config.json"] = json.dumps(wrapped).encode()
    assert pulled(CHECKPOINT).is_file()


def test_a_checkpoint_that_cannot_be_converted_is_kept_and_named(server: HubServer):
    server.repos[CHECKPOINT][LARGE] = b"no weights" * 100
    notes: list[str] = []
    with pytest.raises(InvalidFile, match="damaged"):
        pulled(CHECKPOINT, notes=notes)
    assert [note for note in notes if f"keelback rm {CHECKPOINT}" in note]
    assert Store().discard(CHECKPOINT) == [f"{CHECKPOINT}:checkpoint"]
    assert files_in(Store().folder) == set()


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


def test_without_the_extra_a_sentence_says_what_to_install(server: HubServer, monkeypatch):
    monkeypatch.delitem(sys.modules, "keelback.convert.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvalidInput, match=r"pip install 'keelback\[hub\]'"):
        pulled(GGUF)


def keelback(*arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"input": "", "capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, "-m", "keelback.cli", *arguments], **options)


def test_run_pulls_a_model_once_and_needs_no_hub_afterwards(server: HubServer):
    arguments = ("run", "-hf", f"{CHECKPOINT}:Q8_0", "3 14 15", "-n", "3", "--temp", "0")
    first = keelback(*arguments)
    assert first.returncode == 0 and len(first.stdout.split()) == 3
    server.close()
    listed = json.loads(keelback("ls", "--json").stdout)
    assert [(row["name"], row["type"]) for row in listed] == [(f"{CHECKPOINT}:Q8_0", "Q8_0")]
    assert listed[0]["revision"] == commit(server.repos[CHECKPOINT])
    assert keelback(*arguments).stdout == first.stdout
    assert keelback("rm", CHECKPOINT).stdout == f"removed {CHECKPOINT}:Q8_0\n"
    gone = keelback(*arguments, "--offline")
    assert gone.returncode == 1 and gone.stderr.startswith("Error: ") and not gone.stdout


def test_pull_prints_the_path_and_nothing_else(server: HubServer):
    done = keelback("pull", GGUF)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == "mamba-Q8_0.gguf"
    assert json.loads(keelback("info", done.stdout.strip(), "--json").stdout)["file_bytes"]
    failed = keelback("pull", "user/none")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1 and not failed.stdout


BAD = {
    "a model twice": (("run", "-hf", GGUF, "-m", "demo", "a"), 2, "given twice"),
    "a file of no repository": (("run", "-hff", "x.gguf", "a"), 2, "--hf-repo names none"),
    "a malformed name": (("run", "-hf", "../x", "a"), 1, "USER/MODEL"),
    "no prompt": (("run", "-hf", GGUF), 1, "the prompt is empty"),
    "rm of a path": (("rm", "./model.gguf"), 1, "nothing has been pulled yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_no_request(server: HubServer, case: str):
    arguments, status, said = BAD[case]
    done = keelback(*arguments)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    assert server.requests == []


def started(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "keelback.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_pull_goes_on_from_there(server: HubServer, number: int):
    server.faults[LARGE] = ["slow"]
    process = started("pull", CHECKPOINT)
    partial = Store().downloads(CHECKPOINT)
    size = len(server.repos[CHECKPOINT][LARGE])
    while not any(path.stat().st_size for path in partial.glob(f"sha256-*-{LARGE}.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "goes on from here" in said
        assert len(said.splitlines()) == 1
    assert keelback("ls").stdout.startswith(f"{CHECKPOINT} (unfinished)")
    server.requests.clear()
    pulled(CHECKPOINT)
    assert server.requests[-1][1]["range"] == f"bytes={size // 2}-"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_file_that_cannot_grow_gets_a_sentence_and_can_be_gone_on_with(server: HubServer):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert len(server.repos[GGUF]["mamba-Q8_0.gguf"]) > 50_000
    done = keelback("pull", GGUF, preexec_fn=limit)
    assert done.returncode == 1 and "cannot be written: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and Store().present() == []
    assert pulled(GGUF).read_bytes() == server.repos[GGUF]["mamba-Q8_0.gguf"]
    assert server.requests[-1][1]["range"].startswith("bytes=")


def test_two_processes_pull_a_model_once(server: HubServer):
    both = [started("run", "-hf", CHECKPOINT, "-p", "1", "-n", "1") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert sorted(server.downloads()) == ["config.json", LARGE]


def test_nothing_but_a_pull_imports_huggingface_hub():
    lines = "import sys, keelback.cli, keelback.convert.pull, keelback.convert.store"
    check = f"{lines}\nprint('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
