"""Every way to read a file, under limits of time and memory, compared with independent readers."""

from __future__ import annotations

import base64
import faulthandler
import io as streams
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lars_tree import FileError, cli, io

NEEDS = ("safetensors", "ml_dtypes", "click")

SECONDS = 5.0  # of CPU time, for one call
SPACE = 256 << 20  # bytes that a call may allocate
INFLATED = 1032  # the most bytes that deflate packs into one

Known = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape and bytes by name


class TooLongError(BaseException):
    """A call took too long. The package catches no such exception."""


class BrokenError(Exception):
    """The claim does not hold."""


@contextmanager
def in_memory() -> Iterator[Path]:
    """A temporary directory, in memory where the system has such a file system."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None) as name:
        yield Path(name)


@contextmanager
def limited() -> Iterator[None]:
    """Limit the address space of this process and the time of calls; ignore warnings."""

    def too_long(*arguments: Any) -> None:
        raise TooLongError

    faulthandler.enable()
    signal.signal(signal.SIGPROF, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and zipfile, about names and old headers
        yield


def called(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call within the limits, or its FileError."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = call(*arguments, **options)
    except TooLongError:
        raise BrokenError(f"more than {SECONDS} s") from None
    except FileError as error:
        result = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > SPACE >> 10:
        raise BrokenError(f"more than {SPACE} bytes of memory")
    return result


class Reader:
    """Reads one path. Each of `ways` says whether the file was read, or raises an exception."""

    def __init__(self, path: Path, other: Path) -> None:
        self.path, self._other = path, other
        self._is_npz = path.suffix == ".npz"
        self._inside = str(path if path.suffix in (".npz", ".safetensors") else _directory(path))
        self.ways = [self.load, self.load_flat] * 4 + [self.metadata, self.show, self.diff]
        self.ways += [] if self._is_npz else [self.open, self.open]
        self.ways += [self.load_torch] if "torch" in sys.modules else []

    def load(self) -> bool:
        return self._loaded(called(io.load, self.path))

    def load_flat(self) -> bool:
        return self._loaded(called(io.load, self.path, flat=True))

    def load_torch(self) -> bool:
        return self._loaded(called(io.load, self.path, library="torch", flat=True))

    def open(self) -> bool:
        before = self.files()
        mode = "r+" if sum(map(len, before)) % 2 else "r"
        is_loaded = self._loaded(called(io.open, self.path, mode, flat=True))
        if self.files() != before:
            raise BrokenError("a file was changed")
        return is_loaded

    def metadata(self) -> bool:
        found = called(io.metadata, self.path)
        if self._is_refused(found):
            return False
        if not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise BrokenError(f"it is {found}")
        return True

    def show(self) -> bool:
        status, out, err = called(_commanded, "show", str(self.path), "--json")
        is_read = status == 0 and isinstance(json.loads(out), dict)
        return self._commanded(is_read, err)

    def diff(self) -> bool:
        status, _, err = called(_commanded, "diff", str(self.path), str(self._other))
        return self._commanded(status in (0, 1), err)

    def _commanded(self, is_read: bool, err: str) -> bool:
        if not is_read and (err.count("\n") != 1 or self._inside not in err):
            raise BrokenError(f"it prints {err}")
        return is_read

    def _loaded(self, result: Any) -> bool:
        if self._is_refused(result):
            self._check_reason(str(result))
            return False
        size = sum(map(len, self.files()))
        if result.num_bytes() > size * (INFLATED if self._is_npz else 1):
            raise BrokenError(f"{result.num_bytes()} bytes from {size}")
        found, expected = _described(result), self._known()
        if found != expected:
            names = [x for x in found | expected if found.get(x) != expected.get(x)]
            raise BrokenError(f"another tree, at {names[:3]}")
        return True

    def _is_refused(self, result: Any) -> bool:
        """Whether the result is a FileError, which must name the file."""
        if not isinstance(result, FileError):
            return False
        if type(result) is not FileError or result.argument != "path" or not result.paths:
            raise BrokenError(f"{type(result)} with {result.argument!r}, {result.paths}")
        if self._inside not in str(result):
            raise BrokenError(f"an error without the path: {result}")
        return True

    def _check_reason(self, text: str) -> None:
        """Fail if a file that safetensors reads is refused without a documented reason."""
        if self.path.suffix != ".safetensors":
            return
        try:
            self._known()
        except Exception:  # it is malformed
            return
        if not any(reason in text for reason in _REASONS):
            raise BrokenError(f"a valid file is refused: {text}")

    def files(self) -> list[bytes]:
        """The contents of the file, or of all files next to an index."""
        if os.path.isfile(self._inside):
            return [Path(self._inside).read_bytes()]
        found = []
        for path in sorted(Path(self._inside).iterdir()):
            with suppress(OSError):  # /proc/self/mem
                found += [path.read_bytes()] if path.is_file() else []
        return found

    def packed(self) -> str:
        """The files, to repeat an attempt: base64 of zlib."""
        return "\n".join(base64.b64encode(zlib.compress(x)).decode() for x in self.files())

    def _known(self) -> Known:
        """The arrays as an independent program reads them."""
        if self._is_npz:
            return _of_npz(self.path)
        if self.path.suffix == ".safetensors":
            return _of_safetensors(self.path)
        return _of_set(_directory(self.path))


_REASONS = [
    "the header has this name twice",
    "expected bools of 0 or 1",
    "numpy and ml_dtypes have no",
    "torch has no",
    "expected an object of strings, got None",
    "collides with another name",
    "levels",
    "the structure",
    "nodes for",
    "maximum supported dimension",
]


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _commanded(*arguments: str) -> tuple[int, str, str]:
    out, err = streams.StringIO(), streams.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main(arguments)
    return status, out.getvalue(), err.getvalue()


def _described(tree: Any) -> Known:
    found = {}
    for path, x in zip(tree.paths(), tree.leaves(), strict=True):
        name = ".".join(map(str, path))
        if x is None:
            continue
        if isinstance(x, np.ndarray):
            found[name] = x.dtype.name, x.shape, _bytes(x)
        else:
            torch = sys.modules["torch"]
            data = (
                x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else np.empty(0)
            )
            found[name] = str(x.dtype).removeprefix("torch."), tuple(x.shape), data.tobytes()
    return found


def _bytes(x: np.ndarray) -> bytes:
    """The elements of an array, little-endian."""
    return x.astype(x.dtype.newbyteorder("<")).tobytes()


def _of_npz(path: Path) -> Known:
    found = {}
    with np.load(path, allow_pickle=False) as file:
        _expect_once(file.zip.namelist())
        for name in file.files:
            if name != "__metadata__":
                x = file[f"{name}.npy"]  # an archive may have 'a.npy' and 'a.npy.npy'
                found[name] = x.dtype.name, x.shape, _bytes(x)
    return found


def _expect_once(names: list[str]) -> None:
    """Fail if a name occurs twice: then programs may read different arrays."""
    if len(names) > len(set(names)):
        raise BrokenError("it has a name twice")


_NAMES = {"F": "float", "I": "int", "U": "uint", "C": "complex", "BF": "bfloat"}


def _of_safetensors(path: Path) -> Known:
    from safetensors import deserialize

    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    json.loads(header, object_pairs_hook=lambda pairs: _expect_once([name for name, _ in pairs]))
    found = {}
    for name, x in deserialize(content):
        dtype = x["dtype"]
        kind = dtype.rstrip("0123456789")
        known = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn"}.get(dtype)
        dtype = known or _NAMES.get(kind, kind) + dtype[len(kind) :]
        found[name] = dtype, tuple(x["shape"]), bytes(x["data"])
    return found


def _of_set(directory: Path) -> Known:
    """Read the shards that the index lists. A name in two of them is ambiguous, so an error."""
    (path,) = directory.glob("*.index.json")
    listed = json.loads(path.read_bytes())["weight_map"]
    arrays = {}
    for shard in set(listed.values()):
        if os.path.basename(shard) != shard:
            raise BrokenError(f"it reads {shard!r}")
        for name, x in _of_safetensors(directory / shard).items():
            if name in arrays or listed[name] != shard:
                raise BrokenError(f"{name} in {shard!r}")
            arrays[name] = x
    if arrays.keys() != listed.keys():
        raise BrokenError(f"it gives {list(listed)}, the shards have {list(arrays)}")
    return arrays
