"""Mutations of bytes and of JSON texts. Each function takes a random generator and one content.

`files.py` attacks with them; `mutated_archives.py` has the mutations of zip archives.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np

Random = np.random.Generator

EXTREMES = [0, 1, -1, 2, 4, 8, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1]
EXTREMES += [2**61 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63)]
TOKENS = [b"0", b"9", b'"', b"[", b"]", b"{", b"}", b",", b":", b"-", b"1e9", b"\\", b"\0", b"null"]
TOKENS += [b"\xff" * 8, b"\0" * 8, b"true", b"[],", b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6"]
TOKENS += [b"\x93NUMPY", b"\xed\xa0\x80", "é".encode(), b"NaN", b'"a":', b"|O", b"<f8"]


def one_of(rng: Random, options: Any) -> Any:
    """One item of a sequence."""
    return options[int(rng.integers(len(options)))]


def _span(rng: Random, content: bytes, longest: int = 64) -> tuple[int, int]:
    start = int(rng.integers(len(content) + 1))
    return start, start + int(rng.integers(1, longest))


def _flip(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4)) if content else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _truncate(rng: Random, content: bytes) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def _insert(rng: Random, content: bytes) -> bytes:
    start, _ = _span(rng, content)
    new = one_of(rng, TOKENS) if rng.random() < 0.7 else rng.bytes(int(rng.integers(1, 16)))
    return content[:start] + new + content[start:]


def _overwrite(rng: Random, content: bytes) -> bytes:
    start, _ = _span(rng, content)
    new = one_of(rng, TOKENS)
    return content[:start] + new + content[start + len(new) :]


def _remove(rng: Random, content: bytes) -> bytes:
    start, end = _span(rng, content)
    return content[:start] + content[end:]


def _duplicate(rng: Random, content: bytes) -> bytes:
    start, end = _span(rng, content, 2 + len(content))
    return content[:end] + content[start:]


def _exchange(rng: Random, content: bytes) -> bytes:
    """Exchange two spans of the same length."""
    length = int(rng.integers(1, 32))
    a, b = sorted(int(x) for x in rng.integers(len(content) + 1, size=2))
    if b < a + length:
        return content
    parts = content[:a], content[b : b + length], content[a + length : b]
    return b"".join([*parts, content[a : a + length], content[b + length :]])


def _digits(rng: Random, content: bytes) -> bytes:
    """Replace a number in the text by another one."""
    found = list(re.finditer(rb"-?\d+", content))
    if not found:
        return content
    match = one_of(rng, found)
    number = int(match[0]) if len(match[0]) < 20 else 0
    other = number + int(rng.integers(-9, 10)) if rng.random() < 0.3 else one_of(rng, EXTREMES)
    return content[: match.start()] + str(other).encode() + content[match.end() :]


def _field(rng: Random, content: bytes) -> bytes:
    """Overwrite a binary number of 2, 4 or 8 bytes."""
    length, kind = one_of(rng, [(2, "<H"), (4, "<I"), (8, "<Q")])
    start = int(rng.integers(max(1, len(content) - length)))
    new = struct.pack(kind, one_of(rng, EXTREMES) % (1 << 8 * length))
    return content[:start] + new + content[start + length :]


_OF_BYTES = [_flip, _flip, _truncate, _insert, _overwrite, _remove, _duplicate, _exchange]
_OF_BYTES += [_digits, _field]


def of_bytes(rng: Random, content: bytes) -> bytes:
    """One to three random mutations that know nothing of the format."""
    for _ in range(int(rng.integers(1, 4))):
        content = one_of(rng, _OF_BYTES)(rng, content)
    return content


class Pairs(list[tuple[Any, Any]]):
    """A JSON object, which may have a name twice."""


class Raw(str):
    """A text that stands for itself in JSON."""

    __slots__ = ()


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text, with `Pairs` for objects."""
    return json.loads(text, object_pairs_hook=Pairs)


def written(x: Any) -> str:
    """The JSON text of a value with `Pairs` and `Raw` texts."""
    if isinstance(x, Raw):
        return str(x)
    if isinstance(x, Pairs):
        return "{" + ",".join(f"{written(k)}:{written(v)}" for k, v in x) + "}"
    if isinstance(x, list):
        return "[" + ",".join(map(written, x)) + "]"
    return json.dumps(x, ensure_ascii=len(str(x)) % 2 == 0)


NAMES = ["", "a", "b", "a.b", "a.b.c", ".", "..", "a..b", "__metadata__", "é", "\u202e", "\0", "/"]
NAMES += ["." * 99, "." * 100, "x" * 5000, "lars_tree.structure", "dtype", "0", "-1", "\U0001f600"]
VALUES = [*EXTREMES, *NAMES, None, True, False, 0.5, [], Pairs(), [[]], [1], [0, 0], Raw("NaN")]
VALUES += [Raw("-0"), Raw("1e400"), Raw("1.0"), Raw("4E0"), Raw("00"), Raw('"\\ud800"')]
VALUES += [Raw("[" * 300 + "]" * 300), Raw("[" * 100_000), Raw('{"a":' * 5000), Raw("9" * 5000)]

Slot = tuple[Any, int]


def _slots(x: Any) -> list[Slot]:
    """Where a value has items: pairs of a container and an index."""
    found = [(x, i) for i in range(len(x))] if isinstance(x, list) else []
    for container, i in list(found):
        item = container[i]
        found += _slots(item[1] if isinstance(container, Pairs) else item)
    return found


def _get(slot: Slot) -> Any:
    container, i = slot
    return container[i][1] if isinstance(container, Pairs) else container[i]


def _put(slot: Slot, value: Any) -> None:
    container, i = slot
    value = deepcopy(value)  # it may contain the container
    container[i] = (container[i][0], value) if isinstance(container, Pairs) else value


def of_json(rng: Random, x: Any, values: list[Any] = VALUES) -> Any:
    """One to three random changes of a parsed JSON value, in place. `values` are used as new."""
    for _ in range(int(rng.integers(1, 4))):
        slots = _slots(x)
        if not slots:
            return deepcopy(one_of(rng, values))
        slot, kind = one_of(rng, slots), int(rng.integers(8))
        container, i = slot
        item = _get(slot)
        if kind == 0:
            del container[i]
        elif kind == 1:
            container.insert(int(rng.integers(len(container) + 1)), container[i])
        elif kind == 2:  # a number changes a little; anything else becomes another item
            other = _get(one_of(rng, slots))
            _put(slot, item + int(rng.integers(-9, 10)) if type(item) is int else other)
        elif kind == 3:
            other = one_of(rng, slots)
            value = _get(other)
            if not (isinstance(value, list) or isinstance(item, list)):
                _put(slot, value)
                _put(other, item)
        elif kind == 4 and isinstance(container, Pairs):
            container[i] = (one_of(rng, NAMES), item)
        elif kind == 5 and type(item) is str and item[:1] == "[":  # the structure of a tree
            _put(slot, _of_structure(rng, item, values))
        elif kind == 6:
            order = rng.permutation(len(container))
            container[:] = [container[j] for j in order]
        else:
            _put(slot, one_of(rng, values))
    return x


def _of_structure(rng: Random, text: str, values: list[Any]) -> str:
    try:
        return written(of_json(rng, parsed(text), values))
    except (ValueError, RecursionError):  # it was mutated before
        return text[1:]


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "F6_E2M3"]


def of_safetensors(rng: Random, content: bytes) -> bytes:
    """Mutate the header of a .safetensors file as JSON or as text, the length, or the elements."""
    end = 8 + int.from_bytes(content[:8], "little")
    header, elements = content[8:end], content[end:]
    kind = int(rng.integers(8))
    if kind < 4:
        new = of_json(rng, parsed(header), [*VALUES, *DTYPES, *DTYPES])
        header = written(new).encode(errors="surrogatepass")
    elif kind == 4:
        header = of_bytes(rng, header)
    elif kind == 5:
        elements = of_bytes(rng, elements)
    elif kind == 6:
        length = len(header) + int(rng.integers(-9, 10))
        length = length if rng.random() < 0.5 else one_of(rng, EXTREMES)
        return struct.pack("<Q", length % 2**64) + header + elements
    else:
        header, elements = of_bytes(rng, header), of_bytes(rng, elements)
    return struct.pack("<Q", len(header)) + header + elements


def of_elements(rng: Random, content: bytes) -> bytes:
    """Other elements in the first half of a .safetensors file's, where they are not bools."""
    end = 8 + int.from_bytes(content[:8], "little")
    half = (end + len(content)) // 2
    return content[:end] + _flip(rng, content[end:half]) + content[half:]


Mutation = Callable[[Random, bytes], bytes]
