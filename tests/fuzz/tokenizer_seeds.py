"""Small vocabularies to be damaged, as metadata of a GGUF and as files of a checkpoint."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel

import vocabularies
from keelback.kernels.formats import pretokenizers, spm
from keelback.kernels.formats.spm import TokenType


def small_vocabularies() -> list[dict[str, Any]]:
    """`tokenizer.*` pairs of the two kinds, small."""
    alphabet = sorted(ByteLevel.alphabet())
    controls, user = ["<|im_end|>", "</s>", "<s>"], ["<think>"]
    words = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("c", "at")]
    bpe = [*controls, *user, *alphabet, *(left + right for left, right in words)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *user]
    spelled = ["▁", "t", "h", "e", "a", "c", "th", "the", "▁the", "at", "cat"]
    kinds = [2, 3, 3, *[6] * 256, 4, *[1] * len(spelled)]
    common = {"general.architecture": "mamba", "tokenizer.ggml.add_eos_token": False}
    return [
        common | {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": bpe,
            "tokenizer.ggml.token_type": [3] * 3 + [4] + [1] * (len(bpe) - 4),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in words],
            "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.eot_token_id": 0, "tokenizer.chat_template": "{{ messages }}",
        },
        common | {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [*pieces, *spelled], "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [-float(i) for i in range(len(kinds))],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": True,
        },
    ]  # fmt: skip


def bpe_files(metadata: dict[str, Any]) -> dict[str, Any]:
    texts, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {text: token for token, text in enumerate(texts)}
    library = Library(models.BPE(vocabulary, pairs, ignore_merges=True))
    row = pretokenizers.find("llama-bpe")
    assert row is not None
    _, library.pre_tokenizer = pretokenizers.build(row)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(texts[:3])
    return {
        "tokenizer.json": json.loads(library.to_str()),
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}",
            "added_tokens_decoder": {"0": {"content": "<|im_end|>", "special": True}},
        },
        "special_tokens_map.json": {"eos_token": "</s>"},
        "config.json": {"eos_token_id": 1, "text_config": {"bos_token_id": 2}},
        "generation_config.json": {"eos_token_id": [1, 0]},
    }  # fmt: skip


def sentencepiece_files(metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("tokens", "scores", "token_type")
    columns = [metadata[f"tokenizer.ggml.{name}"] for name in names]
    pieces = [
        spm.Piece(text, score, TokenType(kind)) for text, score, kind in zip(*columns, strict=True)
    ]
    model = spm.SentencePieceModel(pieces, model_type=spm.BPE, byte_fallback=True)
    return {
        "tokenizer.model": spm.serialise(model),
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        "added_tokens.json": {"<think>": 259},
        "generation_config.json": {"eos_token_id": 2},
    }


def ranked_files() -> list[dict[str, Any]]:
    """The forms that are lists of byte strings, and those of the slow classes of transformers."""
    stored = vocabularies.ranks()
    fast = vocabularies.make("qwen2")
    model = json.loads(fast.to_str())["model"]
    merges = "\n".join(
        merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
    )
    return [
        {"tiktoken.model": vocabularies.tiktoken_file(stored), "tokenizer_config.json": {}},
        {"qwen.tiktoken": vocabularies.tiktoken_file(stored)},
        {"tekken.json": vocabularies.tekken(stored)},
        {
            "vocab.json": model["vocab"], "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
            "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
        },
    ]  # fmt: skip
