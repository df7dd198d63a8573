"""Damage to checkpoints as `torch.save` writes them: to the ZIP archive, and to its pickle."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from random import Random

import mutate


def mutated_zip(random: Random, content: bytes) -> bytes:
    """A zip with members renamed, repeated, removed, packed into bombs, or a damaged pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name), zipfile.ZIP_STORED) for name in archive.namelist()]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(members))
        name, raw, method = members[at]
        match random.randrange(8):
            case 0 if len(members) > 1:
                del members[at]
            case 1:
                members.insert(random.randrange(len(members)), random.choice(members))
            case 2:
                members[at] = (
                    random.choice(("../x", "/etc/x", "archive/data/0", "x" * 99, "")) or "y",
                    raw,
                    method,
                )
            case 3:
                members[at] = (name, raw, zipfile.ZIP_DEFLATED)
            case 4:
                members[at] = (
                    name,
                    bytes(random.choice((0, 3, 1 << 16, 1 << 24))),
                    zipfile.ZIP_DEFLATED,
                )
            case 5:
                members[at] = (name, raw[: random.randrange(len(raw) + 1)], method)
            case _:
                at = next((i for i, member in enumerate(members) if member[0].endswith(".pkl")), at)
                name, raw, method = members[at]
                members[at] = (name, mutated_pickle(random, raw), method)
    content = _zipped(members)
    return mutate.damage(random, content) if random.random() < 0.3 else content


_GLOBALS = (
    "os system", "posix system", "builtins eval", "builtins getattr", "subprocess Popen",
    "torch load",
    "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch.storage _load_from_bytes",
    "numpy.core.multiarray _reconstruct", "collections OrderedDict", "x y", "torch._utils os",
)  # fmt: skip


def mutated_pickle(random: Random, data: bytes) -> bytes:
    """A pickle with opcodes removed, repeated, exchanged, or with other arguments."""
    try:
        starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:
        return mutate.damage(random, data)
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(ops))
        match random.randrange(7):
            case 0 if len(ops) > 1:
                del ops[at]
            case 1:
                ops.insert(random.randrange(len(ops)), random.choice(ops))
            case 2:
                module, name = random.choice(_GLOBALS).split()
                found = [i for i, op in enumerate(ops) if op[:1] == b"c"] or [at]
                ops[random.choice(found)] = f"c{module}\n{name}\n".encode()
            case 3:
                raw = mutate.number(random) % 2**64
                ops[at] = random.choice((
                    b"J" + struct.pack("<I", raw % 2**32), b"B" + struct.pack("<I", raw % 2**32),
                    b"\x8a\x09" + struct.pack("<Q", raw) + b"\0", b"r\xff\xff\xff\x7f", b"(" * 9999,
                    b"]" * 9999 + b"a" * 9998, b"q" + random.randbytes(1),
                    b"h" + random.randbytes(1), bytes([random.choice(b"N02()]}tRbQa\x81\x88\x93")]),
                ))  # fmt: skip
            case 4:
                other = random.randrange(len(ops))
                ops[at], ops[other] = ops[other], ops[at]
            case _:
                ops[at] = mutate.damage(random, ops[at])
    return b"".join(ops)


def _zipped(members: list[tuple[str, bytes, int]]) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content, method in members:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, content, method)
    return out.getvalue()
