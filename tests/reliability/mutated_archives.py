"""Mutations of .npz archives that know zip and npy: wrong sizes, offsets, checksums, bombs."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reliability.mutations import EXTREMES, Random, of_bytes, of_json, one_of, parsed, written

_LOCAL = "<4sHHHHHIIIHH"
_CENTRAL = "<4sHHHHHHIIIHHHHHII"
_END = "<4sHHHHIIH"
_COMMON = ["version", "flags", "method", "time", "date", "crc", "packed", "size", "name", "extra"]
_LOCAL_FIELDS = ["signature", *_COMMON]
_CENTRAL_FIELDS = [
    "signature",
    "made",
    *_COMMON,
    "comment",
    "disk",
    "internal",
    "external",
    "start",
]
_END_FIELDS = ["signature", "disk", "first", "here", "entries", "length", "start", "comment"]
_BITS = {"H": 16, "I": 32}

Fields = dict[str, Any]


@dataclass
class Member:
    """An entry. `local` and `central` replace fields of its two headers."""

    name: bytes
    content: bytes
    deflated: bool = False
    packed: bytes | None = None  # instead of the content, deflated or not
    extra: bytes = b""
    after: bytes = b""  # such as a data descriptor
    local: Fields = field(default_factory=dict)
    central: Fields = field(default_factory=dict)


def members(content: bytes) -> list[Member]:
    """The entries of a valid archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [
            Member(x.filename.encode(), archive.read(x), x.compress_type == zipfile.ZIP_DEFLATED)
            for x in archive.infolist()
        ]


def _deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def archive(entries: list[Member], end: Fields, after: bytes = b"") -> bytes:
    """An archive with these entries; `end` replaces fields of its last record."""
    out, directory = b"", b""
    for x in entries:
        packed = x.packed
        if packed is None:
            packed = _deflated(x.content) if x.deflated else x.content
        fields = dict.fromkeys(_CENTRAL_FIELDS, 0)
        fields |= {"version": 20, "made": 20, "date": 33, "method": 8 * x.deflated}
        fields |= {"crc": zlib.crc32(x.content), "packed": len(packed), "size": len(x.content)}
        fields |= {"name": len(x.name), "extra": len(x.extra), "start": len(out)}
        out += _record(_LOCAL, _LOCAL_FIELDS, fields | {"signature": b"PK\3\4"} | x.local)
        out += x.name + x.extra + packed + x.after
        central = fields | {"signature": b"PK\1\2"} | x.central
        directory += _record(_CENTRAL, _CENTRAL_FIELDS, central) + x.name + x.extra
    fields = {"signature": b"PK\5\6", "disk": 0, "first": 0, "here": len(entries), "comment": 0}
    fields |= {"entries": len(entries), "length": len(directory), "start": len(out)} | end
    return out + directory + after + _record(_END, _END_FIELDS, fields)


def _record(kind: str, names: list[str], fields: Fields) -> bytes:
    bits = dict(zip(names[1:], kind[3:], strict=True))
    values = [fields[name] % (1 << _BITS[bits[name]]) for name in names[1:]]
    return struct.pack(kind, fields["signature"], *values)


def npy(shape: Any, descr: Any, order: Any, data: bytes, version: int = 1) -> bytes:
    """A .npy file whose header has these texts."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text) % 2**16)
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


_SHAPES = ["()", "(1,)", "(0,)", "(-1,)", "(2, 3)", "(3, 2)", "(2**3,)", "(6)", "[6]", "(1.0,)"]
_SHAPES += ["(True,)", "(6, 0)", f"({'1, ' * 80})", "(None,)", "('6',)", "((6,),)", "6", "{}"]
_SHAPES += [f"({x},)" for x in EXTREMES] + [f"({x}, {x})" for x in EXTREMES]
_DESCRS = [
    "'<f8'",
    "'>f8'",
    "'<f4'",
    "'|O'",
    "'<U1'",
    "'<U0'",
    "'|V8'",
    "'|b1'",
    "'<M8[s]'",
    "'<i2'",
]
_DESCRS += ["'<c16'", "'<f2'", "'<f16'", "'<f3'", "5", "None", "[('a', '|O')]", "[('a', '<f8')]"]
_DESCRS += ["('<f8', (2,))", "'f8,f8'", "'|S8'", "'=f8'", "'float64'", "'bfloat16'", "''"]
_ORDERS = ["False", "True", "0", "1", "None", "[]", "not 1"]


def _npy(rng: Random, content: bytes) -> bytes:
    """Mutate a .npy file: another header, or random bytes."""
    try:
        array = np.load(io.BytesIO(content))
    except Exception:  # it was mutated before
        array = None
    if array is None or rng.random() < 0.4:
        return of_bytes(rng, content)
    texts = [str(array.shape), repr(array.dtype.str), str(bool(array.flags.fnc))]
    kind = int(rng.integers(4))
    for i, options in enumerate([_SHAPES, _DESCRS, _ORDERS]):
        if kind in (i, 3):
            texts[i] = one_of(rng, options)
    version = one_of(rng, [1, 1, 1, 2, 3, 9])
    return npy(*texts, array.tobytes("A"), version)


METADATA = '{"lars_tree.structure":"[\\"dict\\",[\\"a\\",[\\"list\\",true,null]]]","step":"1"}'


def _inside(rng: Random, entries: list[Member], end: Fields) -> None:
    """Another content with correct sizes and checksums."""
    x = one_of(rng, entries)
    if x.name == b"__metadata__.npy" and rng.random() < 0.8:
        text = written(of_json(rng, parsed(METADATA)))
        stream = io.BytesIO()
        np.save(stream, np.array(text.encode(errors="replace").decode()))
        x.content = stream.getvalue()
    else:
        x.content = _npy(rng, x.content)


def _of_fields(rng: Random, entries: list[Member], end: Fields) -> None:
    """Other numbers in one header, in both headers of an entry, or in the last record."""
    x = one_of(rng, entries)
    for _ in range(int(rng.integers(1, 3))):
        where = int(rng.integers(4))
        name = one_of(
            rng, _COMMON if where == 2 else [_LOCAL_FIELDS, _CENTRAL_FIELDS][where % 2][1:]
        )
        value = one_of(rng, [*EXTREMES, len(x.content), *rng.integers(1 << 16, size=9).tolist()])
        if where == 3:
            end[one_of(rng, _END_FIELDS[1:])] = value
            continue
        if where in (0, 2):
            x.local[name] = value
        if where in (1, 2):
            x.central[name] = value


def _of_members(rng: Random, entries: list[Member], end: Fields) -> None:
    """Entries that are there twice, missing, overlapping, in another order or of other names."""
    kind, x = int(rng.integers(6)), one_of(rng, entries)
    if kind == 0:
        entries.append(x)
    elif kind == 1:
        entries.remove(x)
    elif kind == 2:  # several entries for the same bytes
        for i in range(int(rng.integers(1, 200))):
            copy = Member(b"%d.npy" % i, x.content, x.deflated, b"", central={"start": 0})
            copy.central["packed"] = len(_deflated(x.content) if x.deflated else x.content)
            entries.append(copy)
    elif kind == 3:
        entries[:] = [entries[i] for i in rng.permutation(len(entries))]
    elif kind == 4:
        x.name = one_of(rng, _MEMBER_NAMES)
    else:  # the start of another entry
        x.central["start"] = one_of(rng, [0, 1, 30, 10**6, len(one_of(rng, entries).content)])


_MEMBER_NAMES = [b"", b".npy", b"a.npy", b"a.b.npy", b"a", b"../a.npy", b"/etc/a.npy", b"a\0.npy"]
_MEMBER_NAMES += [b"__metadata__.npy", b"\xff\xfe.npy", "é.npy".encode(), b"." * 150 + b".npy"]
_MEMBER_NAMES += [b"x" * 6000 + b".npy", b"a.npy.npy", b"a/b.npy", b"a\\b.npy", b"a.npy/"]


def _of_compression(rng: Random, entries: list[Member], end: Fields) -> None:
    """Deflated entries: damaged, cut off, with more or fewer bytes than declared; bombs."""
    x, kind = one_of(rng, entries), int(rng.integers(5))
    x.deflated = True
    if kind == 0:
        x.packed = of_bytes(rng, _deflated(x.content))
    elif kind == 1:
        x.packed = _deflated(x.content + bytes(int(rng.integers(1, 1 << 20))))
    elif kind == 2:
        x.packed = _deflated(x.content[: int(rng.integers(len(x.content)))])
    elif kind == 3:  # a valid one, of a thousand times the size of its file
        count = int(rng.integers(1 << 17))
        x.content = npy(f"({count},)", "'<f8'", "False", bytes(8 * count))
    else:  # declares more than it has
        count = one_of(rng, [1 << 20, 1 << 27, 1 << 33])
        start = npy(f"({count},)", "'<f8'", "False", b"")
        x.packed, x.content = _deflated(start + bytes(1 << 16)), start
        x.local["size"] = x.central["size"] = len(start) + 8 * count
        if rng.random() < 0.5:
            x.central["packed"] = one_of(rng, [8 * count, 8 * count // 1000, 2**32 - 2])


def _of_descriptors(rng: Random, entries: list[Member], end: Fields) -> None:
    """Sizes and checksum after the content instead of before it, some of them wrong."""
    for x in entries:
        size, packed = len(x.content), len(_deflated(x.content) if x.deflated else x.content)
        x.local |= {"flags": 8, "crc": 0, "packed": 0, "size": 0}
        x.central |= {"flags": 8}
        kind = one_of(rng, ["<III", "<IQQ"])
        values = [zlib.crc32(x.content), packed, size]
        if rng.random() < 0.3:
            values[int(rng.integers(3))] = int(rng.integers(1 << 32))
        x.after = (b"PK\7\x08" if rng.random() < 0.7 else b"") + struct.pack(kind, *values)


def _of_zip64(rng: Random, entries: list[Member], end: Fields) -> None:
    """Sizes in fields of 64 bits, some of them wrong, missing or cut off."""
    for x in entries:
        size, packed = len(x.content), len(_deflated(x.content) if x.deflated else x.content)
        values = [size, packed]
        if rng.random() < 0.2:
            values[int(rng.integers(2))] = one_of(rng, EXTREMES) % 2**64
        if rng.random() < 0.1:
            values.append(one_of(rng, EXTREMES) % 2**64)
        extra = struct.pack(f"<{len(values)}Q", *values)
        extra = extra if rng.random() < 0.9 else extra[: int(rng.integers(len(extra)))]
        length = len(extra) if rng.random() < 0.9 else int(rng.integers(1 << 16))
        x.extra = struct.pack("<HH", 1, length) + extra
        x.local |= {"packed": 2**32 - 1, "size": 2**32 - 1}
        x.central |= {"packed": 2**32 - 1, "size": 2**32 - 1}
        if len(values) == 3:
            x.central["start"] = 2**32 - 1


def _zip64_end(rng: Random, content: bytes, count: int) -> bytes:
    """A last record of 64 bits, and where it is; some numbers are wrong."""
    end = len(content) - 22
    length, start = struct.unpack("<II", content[end + 12 : end + 20])
    numbers = [44, 45, 45, 0, 0, count, count, length, start]
    if rng.random() < 0.5:
        numbers[int(rng.integers(9))] = one_of(rng, EXTREMES)
    kinds = ["Q", "H", "H", "I", "I", "Q", "Q", "Q", "Q"]
    sizes = {"Q": 64, "H": 16, "I": 32}
    values = [x % (1 << sizes[kind]) for x, kind in zip(numbers, kinds, strict=True)]
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", *values)
    place = end if rng.random() < 0.8 else one_of(rng, EXTREMES) % 2**64
    locator = b"PK\6\7" + struct.pack("<IQI", 0, place, 1)
    last = bytearray(content[end:])
    if rng.random() < 0.7:
        last[8:20] = b"\xff" * 12
    return content[:end] + record + locator + bytes(last)


_CHANGES = [_inside, _inside, _of_fields, _of_fields, _of_members, _of_compression]
_CHANGES += [_of_descriptors, _of_zip64]


def of_archive(rng: Random, content: bytes) -> bytes:
    """Mutate an archive: one or two changes, then its headers are written anew."""
    entries, end = members(content), {}
    for _ in range(int(rng.integers(1, 3))):
        if entries:
            one_of(rng, _CHANGES)(rng, entries, end)
    new = archive(entries, end)
    return _zip64_end(rng, new, len(entries)) if rng.random() < 0.1 else new
