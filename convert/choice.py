"""Which files of a repository make a model: GGUF files by their tag, or those of a checkpoint.

Names come from a server, so only what looks like the path of a plain file is taken for one. Source
of the rules for tags: llama.cpp's `-hf`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ..kernels.errors import InvalidFile, InvalidInput
from . import layouts, tokenizer

#: What is taken where no tag is given, if it is there.
PREFERRED = ("Q4_K_M", "Q8_0")

_REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,95}", re.ASCII)
_PREFIXES = ("https://", "http://", "huggingface.co/", "hf.co/")

_PLAIN = re.compile(r"\w[\w .()+@=,\[\]-]*(?<![ .])")
_LONGEST_NAME = 160

_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4))(?=$|[-.])", re.I
)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
#: GGUF files that are no language model by themselves.
_BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

#: What is read beside weights; of nothing else a conversion could depend on whether it is there.
_SMALL = (*layouts.FILES, *tokenizer.FILES)
#: Weights in the order in which they are preferred; the first kind that is there is taken whole.
_WEIGHTS = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        r"model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors",
        r"model\.safetensors",
        r"consolidated[\w.-]*\.safetensors",
        r"[\w.-]+\.safetensors(\.index\.json)?",
        r"pytorch_model\.bin\.index\.json|pytorch_model-\d+-of-\d+\.bin",
        r"pytorch_model\.bin",
    )
]


@dataclass(frozen=True, slots=True)
class Name:
    """`user/model` or `user/model:TAG`; the tag is empty where there is none."""

    repo: str
    tag: str = ""

    @classmethod
    def parse(cls, text: str) -> Name:
        """A name as users write it; raises InvalidInput for anything else."""
        rest = text
        for prefix in _PREFIXES:
            rest = rest.removeprefix(prefix)
        repo, colon, tag = rest.partition(":")
        odd = "--" in repo or ".." in repo or repo.endswith((".git", ".", "-"))
        if not _REPO.fullmatch(repo) or odd or (colon and not _TAG.fullmatch(tag)):
            raise InvalidInput(
                f"{text[:80]!r} names no model of the hub; write USER/MODEL or USER/MODEL:QUANT"
            )
        return cls(repo, tag)

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


def is_safe(name: str) -> bool:
    """Whether a file's name in a repository is a plain path below its folder."""
    parts = name.split("/")
    return len(name.encode("utf-8", "replace")) <= _LONGEST_NAME and all(
        _PLAIN.fullmatch(part) for part in parts
    )


def tag_of(name: str) -> str:
    """A model file's tag: its quantization, else its name."""
    stem = PurePosixPath(name).name.removesuffix(".gguf")
    if part := _PART.fullmatch(stem):
        stem = part[1]
    found = _QUANT.findall(stem)
    return found[-1].upper() if found else stem


def gguf_models(names: Iterable[str], repo: str) -> dict[str, list[str]]:
    """The GGUF models among a repository's files: the first file -> all files, in order.

    A model whose files are not all there is left out; raises InvalidFile if there is no other.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if base.endswith(".gguf") and is_safe(name) and not any(word in base for word in _BESIDE):
            part = _PART.fullmatch(name[: -len(".gguf")])
            groups.setdefault((part[1], int(part[3])) if part else (name, 1), []).append(name)
    models = {files[0]: files for (_, count), files in groups.items() if len(files) == count}
    if groups and not models:
        raise InvalidFile(f"{repo} lacks parts of its split GGUF files; choose another repository")
    return models


def candidates(models: list[str], tag: str, file: str | None = None) -> list[str]:
    """The models that a tag or a file's name stands for; several where it does not tell.

    Without either: one of the PREFERRED, else the first.
    """
    if file is not None:
        return [name for name in models if name.lower() == file.lower()]
    if tag:
        exact = [name for name in models if tag_of(name).lower() == tag.lower()]
        return exact or [name for name in models if tag_of(name).lower() == f"ud-{tag}".lower()]
    for preferred in PREFERRED:
        if found := candidates(models, preferred):
            return found
    return sorted(models)[:1]


def choose(models: list[str], name: Name, file: str | None) -> str:
    """The one GGUF model of a repository that is meant; raises InvalidInput if that is unclear."""
    found = candidates(models, name.tag, file)
    if len(found) == 1:
        return found[0]
    if file is not None:
        raise InvalidInput(f"{name.repo} has no model file {file[:80]!r}; it has {_list(models)}")
    if found:
        raise InvalidInput(f"{name} could be {_list(found)}; name one of them with --hf-file")
    tags = dict.fromkeys(tag_of(model) for model in models)
    raise InvalidInput(f"{name.repo} has no {name.tag}; it has {_list(tags)}")


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """What converting reads of a checkpoint's files: no other formats, nothing twice.

    Those of its folder come first. Empty where there are no weights that can be converted.
    """
    names = sorted(filter(is_safe, names), key=lambda name: (name.count("/"), name))
    small = [name for name in names if any(_is_like(name, pattern) for pattern in _SMALL)]
    for pattern in _WEIGHTS:
        weights = [name for name in names if pattern.fullmatch(name)]
        if any(not name.endswith(".json") for name in weights):
            return small + weights
    return []


def _is_like(name: str, pattern: str) -> bool:
    """Whether a path has a pattern, whose `*` stands for no slash."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
