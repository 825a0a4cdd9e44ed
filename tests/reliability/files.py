"""Files: a malformed file is refused by name, or gives what other programs read from it.

Small files of ours and of other programs are mutated: their bytes (flipped, cut off, inserted,
duplicated and exchanged spans, other numbers), the JSON of headers, indexes and structures (other
types, dtypes, shapes, offsets and names, repeated and missing names, deep nesting), the records of
zip archives (checksums, sizes, offsets, repeated and overlapping entries, data descriptors, 64-bit
fields, damaged and lying deflate streams, bombs), and the files of a sharded checkpoint (missing,
exchanged, links, directories, pipes). Each mutated file is read in one way: `io.load` with names
split or flat, or into torch; `io.open` in both modes; `io.metadata`; `lars-tree show` or `diff`.

An attempt is survived if the call raises a FileError with the path (the command: exits with status
2 and one line with the path), or gives the names, dtypes, shapes and bytes that numpy reads from an
.npz and the parser of the safetensors package from other files. Elements that were changed must be
refused in an .npz, which has checksums, and must be loaded as they are from a .safetensors file. A
call may take 5 seconds of CPU time and 256 MiB more memory than before, and what it loads may have
as many bytes as the file, or 1032 times as many in an .npz.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lars_tree import io
from tests.reliability import mutations
from tests.reliability.attack import Attempts, attack
from tests.reliability.mutated_archives import of_archive
from tests.reliability.mutations import NAMES, VALUES, Pairs, Random, one_of
from tests.reliability.readers import NEEDS, BrokenError, Reader, in_memory, limited

MIXED = {
    "a": {"b": np.arange(6.0).reshape(2, 3), "c": np.array([True, False])},
    "d": [np.array(7, np.int64), None, np.ones((2, 2), np.float16, order="F")],
    "e": np.empty((0, 3), np.uint8),
}
SPLIT = {"a": {"b": np.arange(3.0)}, "c": np.array([1 + 2j], np.complex64)}
FLAT = {"a": np.arange(4, dtype=np.int32), "b": np.arange(2.0)}

VALID = ("elements", "order")  # after these mutations, a file must be loaded


def _attempts(
    rng: Random,
    readers: list[Reader],
    restored: Callable[[Reader], None],
    mutated: Callable[[Reader], str],
) -> Attempts:
    """Read each valid file in every way, then mutated ones for ever."""
    with limited():
        for reader in readers:
            for way in reader.ways:
                yield _outcome(reader, way, "unchanged", is_valid=True)
        while True:
            reader = one_of(rng, readers)
            what = mutated(reader)
            yield _outcome(reader, one_of(rng, reader.ways), what, is_valid=what in VALID)
            restored(reader)


def _outcome(reader: Reader, way: Callable[[], bool], what: str, *, is_valid: bool) -> str | None:
    try:
        is_loaded = way()
        if is_valid and not is_loaded:
            raise BrokenError("a valid file is refused")
    except Exception as error:
        text = f"{way.__name__} of {reader.path.name} ({what}): {type(error).__name__}: {error}"
        return f"{text}\n{reader.packed()}"
    return None


def _single(
    rng: Random, files: dict[str, bytes], directory: Path, kinds: dict[str, mutations.Mutation]
) -> Attempts:
    """Attempts with mutations of single files, by what they are."""
    readers = []
    for name, content in files.items():
        (directory / name).write_bytes(content)
        readers.append(Reader(directory / name, directory / next(iter(files))))

    def mutated(reader: Reader) -> str:
        what = one_of(rng, list(kinds))
        reader.path.write_bytes(kinds[what](rng, files[reader.path.name]))
        return what

    def restored(reader: Reader) -> None:
        reader.path.write_bytes(files[reader.path.name])

    yield from _attempts(rng, readers, restored, mutated)


@attack(
    "A malformed .npz raises FileError, or gives what numpy reads",
    "mutated files",
    count=30_000,
    short=600,
    seconds=150,
    needs=(*NEEDS, "torch"),
)
def npz(rng: Random) -> Attempts:
    import torch  # noqa: F401  # before memory is limited

    with in_memory() as directory:
        files = {}
        io.save(MIXED, directory / "mixed.npz", metadata={"step": "1"})
        io.save(SPLIT, directory / "split.npz")
        np.savez(directory / "numpy.npz", **FLAT)
        np.savez_compressed(directory / "deflated.npz", **FLAT)
        for path in sorted(directory.iterdir(), key=lambda path: path.name != "split.npz"):
            files[path.name] = path.read_bytes()
        kinds = {"bytes": mutations.of_bytes, "records": of_archive, "archive": of_archive}
        yield from _single(rng, files, directory, kinds)


@attack(
    "A malformed .safetensors file raises FileError, or gives what safetensors reads",
    "mutated files",
    count=45_000,
    short=1500,
    seconds=150,
    needs=(*NEEDS, "torch"),
)
def safetensors(rng: Random) -> Attempts:
    import torch  # noqa: F401  # before memory is limited
    from safetensors.numpy import save

    with in_memory() as directory:
        io.save(MIXED, directory / "mixed.safetensors", metadata={"step": "1"})
        io.save(SPLIT, directory / "split.safetensors")
        files = {x.name: x.read_bytes() for x in sorted(directory.iterdir())}
        files["theirs.safetensors"] = save(FLAT, {"format": "np"})
        kinds = {
            "bytes": mutations.of_bytes,
            "header": mutations.of_safetensors,
            "elements": mutations.of_elements,
            "header or elements": mutations.of_safetensors,
        }
        yield from _single(rng, files, directory, kinds)


INDEX = "model.safetensors.index.json"
SHARDED = {"a": {"b": np.arange(2.0)}, "c": np.array([True]), "d": [np.ones(3), None]}
SECRET = {"a": {"b": np.ones(2)}, "c": np.array([False]), "d": [np.zeros(3), None]}


@attack(
    "A malformed sharded checkpoint raises FileError, or gives what its shards have",
    "mutated indexes and shards",
    count=25_000,
    short=900,
    seconds=150,
    needs=NEEDS,
)
def sharded(rng: Random) -> Attempts:
    """The directory above has shards too, which must never be read."""
    with in_memory() as above:
        directory, outside = above / "checkpoint", above / "outside"
        for path, tree in ((directory, SHARDED), (outside, SECRET)):
            path.mkdir()
            io.save(tree, path, max_shard_size=24, metadata={"step": "1"})
        for path in outside.iterdir():
            shutil.copy(path, above)
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        readers = [Reader(directory / INDEX, outside), Reader(directory, outside)]

        def restored(reader: Reader) -> None:
            for path in directory.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for name, content in files.items():
                (directory / name).write_bytes(content)

        def mutated(reader: Reader) -> str:
            change = one_of(rng, _OF_SETS)
            change(rng, directory, outside)
            return change.__name__

        yield from _attempts(rng, readers, restored, mutated)


def _bytes_of_index(rng: Random, directory: Path, outside: Path) -> None:
    path = directory / INDEX
    path.write_bytes(mutations.of_bytes(rng, path.read_bytes()))


def _json_of_index(rng: Random, directory: Path, outside: Path) -> None:
    path = directory / INDEX
    new = mutations.of_json(rng, mutations.parsed(path.read_bytes()), VALUES)
    path.write_bytes(mutations.written(new).encode(errors="surrogatepass"))


def _names_of_shards(rng: Random, directory: Path, outside: Path) -> None:
    """Other files in the index: outside of the directory, missing, or without the array."""
    path = directory / INDEX
    index = dict(mutations.parsed(path.read_bytes()))
    pairs = index["weight_map"]
    i = int(rng.integers(len(pairs)))
    name, shard = pairs[i]
    others = [f"../{shard}", f"../outside/{shard}", str(outside / shard), f"./{shard}", shard]
    others += [f"..\\{shard}", f"{shard}/", f"{shard}\0", f"C:{shard}", shard.upper(), f" {shard}"]
    others += [
        one_of(rng, pairs)[1],
        "x" * 300 + ".safetensors",
        ".safetensors",
        "/dev/zero",
        INDEX,
    ]
    others += [f"{one_of(rng, NAMES)}.safetensors", "-.safetensors", "model.safetensors"]
    pairs[i] = (name, one_of(rng, others))
    if rng.random() < 0.3:
        pairs.insert(int(rng.integers(len(pairs) + 1)), (one_of(rng, NAMES), one_of(rng, pairs)[1]))
    path.write_bytes(mutations.written(Pairs(index.items())).encode(errors="surrogatepass"))


def _shard(rng: Random, directory: Path) -> Path:
    return one_of(rng, sorted(directory.glob("*.safetensors")))


def _content_of_shard(rng: Random, directory: Path, outside: Path) -> None:
    path = _shard(rng, directory)
    kind = one_of(rng, [mutations.of_safetensors, mutations.of_bytes])
    path.write_bytes(kind(rng, path.read_bytes()))


def order(rng: Random, directory: Path, outside: Path) -> None:
    """The index in another order, which is valid."""
    path = directory / INDEX
    index = mutations.parsed(path.read_bytes())
    for pairs in (index, dict(index)["weight_map"]):
        pairs[:] = [pairs[i] for i in rng.permutation(len(pairs))]
    path.write_bytes(mutations.written(index).encode())


def _kind_of_shard(rng: Random, directory: Path, outside: Path) -> None:
    """Not a file any more, or another file."""
    path, other = _shard(rng, directory), _shard(rng, directory)
    kind, content = int(rng.integers(9)), path.read_bytes()
    if kind == 0:
        path.write_bytes(other.read_bytes())
    elif kind == 1:
        other.write_bytes(content)
        io.save({"c": np.array([True]), "a.b": np.arange(2.0)}, path)
    path.unlink()
    if kind == 2:
        path.mkdir()
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.symlink_to(one_of(rng, ["nowhere", path.name, os.devnull, "/dev/zero", outside]))
    elif kind == 5:  # as in the cache of the Hub
        path.symlink_to(outside / path.name)
    elif kind == 6:
        os.link(outside / other.name, path)
    elif kind == 7:
        path.write_bytes((outside / INDEX).read_bytes())


_OF_SETS = [_bytes_of_index, _json_of_index, _json_of_index, _names_of_shards, _content_of_shard]
_OF_SETS += [_kind_of_shard, order]
