"""What is fuzzed: for each target its seeds, how they are damaged, and what reads the result.

A target is a class: made once a worker with a folder of its own, `mutated(random)` is an input, and
`run(path)` reads one, which may raise nothing but KeelbackError. To add one, add it to TARGETS.
"""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
import zlib
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

import mutate
import tiny
import tiny_files
from containers import Gguf, Safetensors
from keelback.convert import convert
from keelback.convert.tokenizer import read_tokenizer
from keelback.engine import snapshot as snapshots
from keelback.engine.footprint import plan
from keelback.engine.info import describe
from keelback.engine.model import Model
from keelback.engine.session import Session
from keelback.engine.tokenizer import Tokenizer
from keelback.kernels.errors import InvalidInput, KeelbackError
from keelback.kernels.objects import warm_up
from tokenizer_seeds import bpe_files, ranked_files, sentencepiece_files, small_vocabularies
from torchzip import mutated_zip

TEXT = "The 12 cats' <think>hats</s> \n\n<|im_end|>é 日本 \0"


class Target(Protocol):
    """See above."""

    def __init__(self, folder: Path) -> None: ...

    def mutated(self, random: Random) -> bytes:
        """An input."""
        ...

    def run(self, path: Path) -> None:
        """Read one."""
        ...


def quiet(text: str) -> None:
    """Notices are for users."""


def tiny_gguf(folder: Path, name: str, outtype: str) -> Path:
    return convert(tiny.write_checkpoint(name, folder / name), folder / f"{name}.gguf", outtype)


class GgufFiles:
    """Model files: told about, planned for, loaded, run for a token."""

    SEEDS = (
        ("mamba-q8", "q8_0"), ("mamba-untied", "f32"), ("mamba2-g2", "f32"), ("gdn-gate", "f16"),
        ("granite-moe", "f32"), ("bamba-grouped", "bf16"), ("qwen35-q8", "q8_0"),
        ("qwen35moe-fused", "f32"), ("next-moe", "f32"), ("nemotron-latent", "f32"),
        ("falcon-h1-norm", "f32"), ("jamba-moe", "f32"), ("kimi-hub", "f32"), ("ling-hub", "f32"),
        ("lfm2moe-bias", "f32"), ("olmo-rope", "f32"), ("gdn-attn", "f32"), ("kda-pure", "f32"),
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        # A damaged file may need any kernel, and compiling one would count as a hang.
        warm_up(quiet)
        paths = [tiny_gguf(folder, *seed) for seed in self.SEEDS]
        for path in paths:
            self.run(path)
        self.seeds = [Gguf.parse(path) for path in paths]
        metadata = small_vocabularies()[0]
        spoken = Gguf.parse(paths[0])
        spoken.pairs = [pair for pair in spoken.pairs if pair[0].decode() not in metadata]
        spoken.pairs += [_pair(key, value) for key, value in metadata.items()]
        self.seeds.append(spoken)

    def mutated(self, random: Random) -> bytes:
        return random.choice(self.seeds).mutated(random)

    def run(self, path: Path) -> None:
        """Both backends would take twice the time: the content chooses one."""
        backend = "numpy" if zlib.crc32(path.read_bytes()) & 1 else "cpu"
        describe(str(path))
        plan(str(path), 1, None)
        model = Model(path, backend=backend, threads=1, notice=quiet)
        model.forward([0, 0])
        if model.tokenizer.kind != "none":
            model.tokenizer.encode(TEXT)


def _pair(key: str, value: Any) -> list[Any]:
    """A pair of `Gguf`: text, a bool, a whole number, or a list of texts or numbers."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    if isinstance(value, str):
        return [key.encode(), 8, string(value)]
    if isinstance(value, bool):
        return [key.encode(), 7, bytes([value])]
    if isinstance(value, int):
        return [key.encode(), 4, struct.pack("<I", value)]
    texts = bool(value) and isinstance(value[0], str)
    raw = b"".join(string(text) for text in value) if texts else np.array(value, "<i4").tobytes()
    return [key.encode(), 9, struct.pack("<IQ", 8 if texts else 5, len(value)) + raw]


class States:
    """Saved states: loaded, gone on with for two tokens. Most fit their checksum."""

    def __init__(self, folder: Path) -> None:
        self.models, self.seeds = [], []
        for name in ("mamba2-g2", "granite-dense", "kimi-hub"):
            model = Model(tiny_gguf(folder, name, "f32"), backend="numpy", notice=quiet)
            session = Session(model, seed=1, stop=["é" * 9, "x"], logit_bias={3: 1.5})
            session.feed([1, 2, 3, 4, 5])
            session.next_token()
            session.snapshot("a note").save(path := folder / name / "state")
            self.models.append(model)
            self.seeds.append(Safetensors.parse(path.read_bytes()))
            self.run(path)

    def mutated(self, random: Random) -> bytes:
        seed = random.choice(self.seeds)
        way = random.random()
        if way < 0.1:
            return mutate.damage(random, seed.pack(), 2000)
        if way < 0.25:
            return seed.pack(lambda header: mutate.json_value(random, header))
        file = Safetensors(
            {name: list(parts) for name, parts in seed.tensors.items()}, dict(seed.metadata)
        )
        if way < 0.8:
            facts = mutate.json_value(random, json.loads(file.metadata["facts"]))
            file.metadata["facts"] = mutate.to_json(facts)
        if way > 0.7:
            self._damage_tensor(random, file)
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            file.metadata["checksum"] = snapshots._checksum(file.arrays(), file.metadata["facts"])
        return file.pack()

    def _damage_tensor(self, random: Random, file: Safetensors) -> None:
        name = random.choice(list(file.tensors))
        dtype, shape, raw = file.tensors[name]
        match random.randrange(6):
            case 0:
                del file.tensors[name]
            case 1:
                file.tensors[random.choice((mutate.text(random), *file.tensors))] = [
                    dtype,
                    shape,
                    raw,
                ]
            case 2:
                file.tensors[name] = [
                    random.choice(("F32", "F64", "I64", "I32", "U8", "BOOL")),
                    shape,
                    raw,
                ]
            case 3:
                values = np.array(random.choices(mutate.FLOATS, k=len(raw) // 4), np.float64)
                file.tensors[name][2] = values.astype("<f4").tobytes()
            case 4:
                file.tensors[name] = [dtype, [1, *shape], raw]
            case _:
                rows = random.choice((0, 1, 2, 1000))
                width = len(raw) // max(1, shape[0]) if shape else 0
                file.tensors[name] = [dtype, [rows, *shape[1:]], bytes(rows * width)]

    def run(self, path: Path) -> None:
        """One of the models may be its own."""
        failures = []
        for model in self.models:
            try:
                session = Session.resume(model, snapshots.Snapshot.load(path, model))
                list(session.generate(2))
            except KeelbackError as error:
                failures.append(error)
        if len(failures) == len(self.models):
            raise failures[-1]


class Tokenizers:
    """Vocabularies, as metadata of a GGUF and as files of a checkpoint: built, and used once.

    An input is JSON: {"metadata": pairs}, or {"files": {name: text, or bytes in hex}, "tokens": n}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoint"
        self.folder.mkdir()
        bpe, llama = small_vocabularies()
        self.metadata = [bpe, llama]
        self.files = [
            (bpe_files(bpe), len(bpe["tokenizer.ggml.tokens"])),
            (sentencepiece_files(llama), len(llama["tokenizer.ggml.tokens"])),
            *((files, 700) for files in ranked_files()),
        ]
        path = folder / "seed.json"
        for seed in [
            *({"metadata": m} for m in self.metadata),
            *(self._stored(*f) for f in self.files),
        ]:
            path.write_text(json.dumps(seed))
            self.run(path)

    def _stored(self, files: dict[str, Any], tokens: int) -> dict[str, Any]:
        spelled = {
            name: {"hex": value.hex()} if isinstance(value, bytes) else mutate.to_json(value)
            for name, value in files.items()
        }
        return {"files": spelled, "tokens": tokens}

    def mutated(self, random: Random) -> bytes:
        if random.random() < 0.4:
            metadata = mutate.json_value(random, random.choice(self.metadata))
            return mutate.to_json({"metadata": metadata}).encode("utf-8", "surrogatepass")
        files, tokens = random.choice(self.files)
        files, name = dict(files), random.choice(list(files))
        if name.endswith(".model") and isinstance(files[name], bytes) and random.random() < 0.8:
            files[name] = mutate.protobuf(random, files[name])
        elif isinstance(files[name], bytes):
            files[name] = mutate.damage(random, files[name])
        elif random.random() < 0.8:
            files[name] = mutate.json_value(random, files[name])
        else:
            files[name] = mutate.damage(random, mutate.to_json(files[name]).encode())
        if random.random() < 0.1:
            tokens = mutate.near(random, tokens) % 5000
        return json.dumps(self._stored(files, tokens)).encode()

    def run(self, path: Path) -> None:
        """Rebuild the vocabulary, then write a text with it and read it back."""
        try:
            stored = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise InvalidInput("no input") from None
        metadata = stored.get("metadata")
        if metadata is None:
            for old in self.folder.iterdir():
                old.unlink()
            for name, value in stored["files"].items():
                raw = (
                    value.encode("utf-8", "surrogatepass")
                    if isinstance(value, str)
                    else bytes.fromhex(value["hex"])
                )
                (self.folder / name).write_bytes(raw)
            metadata = read_tokenizer(self.folder, stored["tokens"])
        if not isinstance(metadata, dict):
            raise InvalidInput("no input")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = Tokenizer.from_metadata(
                {key: _as_read(value) for key, value in metadata.items()}, path
            )
        ids = tokenizer.encode(TEXT if tokenizer.kind != "none" else "1 2")
        tokenizer.encode(TEXT if tokenizer.kind != "none" else "1 2", parse_special=False)
        tokenizer.decode(ids)
        for token in range(min(tokenizer.vocab_size, 300)):
            tokenizer.piece(token)


def _as_read(value: Any) -> Any:
    """A value as the GGUF reader gives it: numbers in arrays, texts in lists, texts in UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if not isinstance(value, list):
        return value
    if all(isinstance(inner, str) for inner in value):
        return [_as_read(inner) for inner in value]
    for kind in (np.int32, np.int64, np.float32):
        try:
            with np.errstate(over="ignore"):
                return np.array(value, kind)
        except (TypeError, ValueError, OverflowError):
            continue
    return []


class TorchFiles:
    """Checkpoints whose weights are a pickle in an archive: converted."""

    def __init__(self, folder: Path) -> None:
        self.folder = tiny.write_checkpoint("mamba-tied", folder / "checkpoint")
        (self.folder / "model.safetensors").unlink()
        tiny_files.write_torch(seed := folder / "seed.bin", tiny.stored("mamba-tied"))
        self.seed = seed.read_bytes()
        self.run(seed)

    def mutated(self, random: Random) -> bytes:
        return mutated_zip(random, self.seed)

    def run(self, path: Path) -> None:
        """The file has to have the name that is looked for."""
        (self.folder / "pytorch_model.bin").write_bytes(path.read_bytes())
        convert(self.folder, self.folder / "out.gguf")


class Configs:
    """config.json of checkpoints, which the first line of an input names: converted."""

    SEEDS = (
        "mamba-untied", "mamba2-g2", "granite-moe", "bamba-grouped", "qwen35moe-fused", "next-moe",
        "nemotron-latent", "falcon-h1-norm", "jamba-moe", "kimi-hub", "ling-hub", "lfm2moe-bias",
        "olmo-rope", "gdn-attn", "kda-pure",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [tiny.write_checkpoint(name, folder / name) / "config.json" for name in self.SEEDS]
        self.configs = [json.loads(path.read_text()) for path in paths]

    def mutated(self, random: Random) -> bytes:
        name, config = random.choice(list(zip(self.SEEDS, self.configs, strict=True)))
        text = mutate.to_json(mutate.json_value(random, config))
        return f"{name}\n{text}".encode("utf-8", "surrogatepass")

    def run(self, path: Path) -> None:
        """The tensors beside it are sound."""
        name, _, config = path.read_bytes().partition(b"\n")
        checkpoint = self.folder / name.decode()
        (checkpoint / "config.json").write_bytes(config)
        convert(checkpoint, self.folder / "out.gguf")


TARGETS: dict[str, type[Target]] = {
    "gguf": GgufFiles, "state": States, "tokenizer": Tokenizers, "bin": TorchFiles,
    "config": Configs,
}  # fmt: skip
