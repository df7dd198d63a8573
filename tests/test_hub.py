"""Pulling models: against a local server that plays the hub, and that misbehaves on demand."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from hubserver import CHECKPOINT, GGUF, LARGE, HubServer, commit, locate_fails, pulled
from keelback.convert import convert
from keelback.convert.pull import Wanted, locate
from keelback.convert.store import Store
from keelback.kernels.errors import InvalidFile, InvalidInput, KeelbackError, UnsupportedModel

CONVERTED = "mamba-tied-F32.gguf"


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
    with pytest.raises(InvalidInput, match="only GGUF files, which --outtype"):
        pulled(GGUF, outtype="f16")


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


def test_a_pulled_checkpoint_has_the_tokenizer_of_a_local_one(server: HubServer, tmp_path: Path):
    beside = {"additional_chat_templates/rag.jinja": b"{{ messages }}", "vocab.txt": b"the\n"}
    server.repos[CHECKPOINT] |= beside
    with pytest.raises(UnsupportedModel, match=r"vocab\.txt is a tokenizer keelback cannot conv"):
        pulled(CHECKPOINT)
    folder = tmp_path / "models" / CHECKPOINT / CHECKPOINT.split("/")[1]
    assert files_in(folder) == {"config.json", LARGE, *beside}
    assert Store().discard(CHECKPOINT) and files_in(tmp_path / "models") == set()


def test_a_checkpoint_that_cannot_be_converted_is_kept_and_named(server: HubServer):
    server.repos[CHECKPOINT][LARGE] = b"no weights" * 100
    notes: list[str] = []
    with pytest.raises(InvalidFile, match="damaged"):
        pulled(CHECKPOINT, notes=notes)
    assert [note for note in notes if f"keelback rm {CHECKPOINT}" in note]
    assert Store().discard(CHECKPOINT) == [f"{CHECKPOINT}:checkpoint"]
    assert files_in(Store().folder) == set()


def test_without_the_extra_a_sentence_says_what_to_install(server: HubServer, monkeypatch):
    monkeypatch.delitem(sys.modules, "keelback.convert.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvalidInput, match=r"pip install 'keelback\[hub\]'"):
        pulled(GGUF)
