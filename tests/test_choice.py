"""Which files of a repository are taken, and that no name of a server is taken for a path."""

from __future__ import annotations

import pytest

from keelback.convert.choice import (
    Name,
    candidates,
    checkpoint_files,
    choose,
    gguf_models,
    is_safe,
    tag_of,
)
from keelback.kernels.errors import InvalidFile, InvalidInput

QUANTS = ["m-BF16.gguf", "m-IQ4_XS.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_XL.gguf"]


@pytest.mark.parametrize(
    ("text", "repo", "tag"),
    [
        ("user/model", "user/model", ""),
        ("user/model:Q8_0", "user/model", "Q8_0"),
        ("https://huggingface.co/user/Mamba-1.4b_x:q4_k_m", "user/Mamba-1.4b_x", "q4_k_m"),
        ("hf.co/user/model", "user/model", ""),
    ],
)
def test_a_name_is_a_repository_and_perhaps_a_tag(text: str, repo: str, tag: str):
    assert Name.parse(text) == Name(repo, tag)


@pytest.mark.parametrize(
    "text",
    [
        *("", "model", "../x", "a/b/c", "/a/b", "a/..", "./a", "a/.b", "a/b:", "a/b:c:d"),
        *("a/b:../x", "a/b\n", "a/\x1b[2Jb", "a\\b/c", "a/b--c", "a/b.git", "a b/c", "~/x"),
        *("ä/b", "a/" + "b" * 97),
    ],
)  # fmt: skip
def test_a_malformed_name_gets_a_sentence(text: str):
    with pytest.raises(InvalidInput, match="USER/MODEL") as raised:
        Name.parse(text)
    assert str(raised.value).isprintable()


def test_tags_are_found_in_file_names():
    tags = {
        "m-Q8_0.gguf": "Q8_0",
        "m.q4_k_m.gguf": "Q4_K_M",
        "m-UD-Q4_K_XL.gguf": "UD-Q4_K_XL",
        "Q8_0/m-Q8_0-00001-of-00002.gguf": "Q8_0",
        "m-IQ3_XXS.imat.gguf": "IQ3_XXS",
        "mamba-2.8b-bf16.gguf": "BF16",
        "mamba_f16.gguf": "F16",
        "mamba-130m.gguf": "mamba-130m",
        "m-MXFP4_MOE.gguf": "MXFP4_MOE",
    }
    assert {name: tag_of(name) for name in tags} == tags


def test_a_tag_chooses_a_file_whatever_its_case():
    assert candidates(QUANTS, "q8_0") == ["m-Q8_0.gguf"]
    assert candidates(QUANTS, "ud-q4_k_xl") == ["m-UD-Q4_K_XL.gguf"]
    assert candidates(QUANTS, "Q4_K_XL") == ["m-UD-Q4_K_XL.gguf"]
    assert candidates([*QUANTS, "m-UD-Q8_0.gguf"], "Q8_0") == ["m-Q8_0.gguf"]
    assert candidates(QUANTS, "Q4_K") == []


def test_without_a_tag_the_preferred_ones_come_first():
    assert candidates(QUANTS, "") == ["m-Q4_K_M.gguf"]
    assert candidates(["m-BF16.gguf", "m-Q8_0.gguf"], "") == ["m-Q8_0.gguf"]
    assert candidates(["m-Q6_K.gguf", "m-BF16.gguf"], "") == ["m-BF16.gguf"]
    assert candidates([], "") == []


def test_what_is_unclear_gets_a_sentence_with_what_there_is():
    with pytest.raises(InvalidInput, match=r"u/m has no Q5_0; it has BF16, IQ4_XS, Q4_K_M"):
        choose(QUANTS, Name("u/m", "Q5_0"), None)
    with pytest.raises(InvalidInput, match=r"could be a-Q8_0.gguf, b-Q8_0.gguf; .*--hf-file"):
        choose(["a-Q8_0.gguf", "b-Q8_0.gguf"], Name("u/m"), None)
    with pytest.raises(InvalidInput, match=r"no model file 'c.gguf'; it has a-Q8_0.gguf, b"):
        choose(["a-Q8_0.gguf", "b-Q8_0.gguf"], Name("u/m"), "c.gguf")
    assert choose(["a-Q8_0.gguf", "b-Q8_0.gguf"], Name("u/m"), "B-Q8_0.gguf") == "b-Q8_0.gguf"


def test_split_files_belong_together_and_others_are_left_out():
    split = [f"Q8_0/m-Q8_0-{i:05}-of-00003.gguf" for i in (2, 1, 3)]
    beside = ["mmproj-F16.gguf", "m.imatrix.gguf", "mtp-m.gguf", "README.md", "m-Q8_0.gguf.json"]
    models = gguf_models(["m-F16.gguf", *split, *beside], "u/m")
    assert models == {"m-F16.gguf": ["m-F16.gguf"], split[1]: sorted(split)}
    with pytest.raises(InvalidFile, match="lacks parts"):
        gguf_models(split[:2], "u/m")


HOSTILE = [
    "../m.gguf", "a/../../m.gguf", "/etc/m.gguf", "a//m.gguf", "./m.gguf", ".m.gguf", "a/.b/m.gguf",
    "..\\m.gguf", "C:\\m.gguf", "C:m.gguf", "m\n.gguf", "m\x1b[2J.gguf", "m\0.gguf", "a /m.gguf",
    "a./m.gguf", "m" * 200 + ".gguf", "m\udce4.gguf", "",
    "-m.safetensors", ".m.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_name_is_never_taken(name: str):
    assert not is_safe(name)
    assert gguf_models([name], "u/m") == {} and checkpoint_files([name, "config.json"]) == []


WEIGHTS = {
    "the index and its shards": (
        ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
        ["consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"],
    ),
    "one file": (["model.safetensors"], ["consolidated.safetensors", "pytorch_model.bin"]),
    "Mistral's": (["consolidated.safetensors"], ["pytorch_model.bin"]),
    "any other name": (["weights.safetensors"], ["pytorch_model.bin"]),
    "pickles, if there is nothing else": (
        ["pytorch_model.bin"],
        ["model.pth", "training_args.bin"],
    ),
    "sharded pickles": (
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
        ["model.onnx", "optimizer.bin"],
    ),
}
SMALL = [
    "chat_template.jinja", "chat_template.json", "config.json", "hf_quant_config.json",
    "params.json", "rwkv_vocab_v20230424.txt", "spiece.model", "tiktoken.model",
    "tokenization_kimi.py", "tokenizer.json", "tokenizer.model.v3", "vocab.txt",
    "additional_chat_templates/rag.jinja",
]  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_checkpoint_is_taken_once_and_without_what_is_not_read(case: str):
    taken, left = WEIGHTS[case]
    never = ["modeling.py", "onnx/model.onnx", "sub/model.safetensors", "README.md", "flax.msgpack"]
    never += ["sub/vocab.txt", "sub/tokenizer.model.v3", "additional_chat_templates/a/b.jinja"]
    found = checkpoint_files([*taken, *left, *never, *SMALL])
    assert sorted(found) == sorted([*taken, *SMALL])
    # A checkpoint in the store is where its first file is.
    assert "/" not in found[0]
