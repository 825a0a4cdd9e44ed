"""Replace a sharded checkpoint atomically: at any moment, its index leads to a complete set.

The new shards are staged in a directory of their own. Then they get names that no file has, and the
new index replaces the old one: this is the moment at which the new set replaces the old. Finally
the old shards are removed. After an exception or a kill, `abandoned.settle` removes the shards that
are not in use.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO

from lars_tree import errors
from lars_tree._files import abandoned, index, locking, replacing
from lars_tree._files.abandoned import INDEX, JOURNAL, MODE, PREFIX, STAGED
from lars_tree._files.replacing import Write


def replace_set(
    path: str, shards: Sequence[Write], index_text: Callable[[list[str]], bytes]
) -> None:
    """Write shards and their index, which replace the index at `path` and its shards.

    `index_text` returns the content of the index for the names of the shards. Permissions are
    preserved as in `replacing.replace`; if the shards of the old index have different
    permissions, each new shard gets only those that all of them gave.

    Raises:
        FileError: a single file with the same stem is there, or the index is a link to another
            directory.
        OSError: a file cannot be written. The old set is unchanged, unless the message says that
            the new file is in place but its directory could not be synced.
    """
    with replacing.naming(path) as target:
        directory = os.path.dirname(target)
        _check(path, target)
        abandoned.remove(directory)
        staged = os.path.join(directory, f"{PREFIX}{secrets.token_hex(8)}{STAGED}")
        # One lock for both functions: `_end` would wait forever for one that a traceback keeps.
        with locking.DirectoryLock(directory) as lock:
            try:
                try:  # begins before `staged` is created, because Ctrl-C may come at any moment
                    _replace(target, staged, lock, shards, index_text)
                finally:
                    _end(staged, lock)
            finally:  # if Ctrl-C came in the inner `finally`
                _end(staged, lock)


def _check(path: str, target: str) -> None:
    """Raise an error if the set cannot be replaced."""
    headline = f"path {path!r} cannot be written"
    directory = os.path.dirname(target)
    if directory != os.path.realpath(os.path.dirname(path) or os.curdir):
        text = (
            f"it is a link to another directory, but shards are next to their index: use {target!r}"
        )
        raise errors.error(errors.FileError, "path", headline, [((), text)])
    single = f"{index.stem(target)}.safetensors"
    if os.path.lexists(os.path.join(directory, single)):
        text = (
            f"other programs would still load {single!r}, which is in the same directory: remove it"
        )
        raise errors.error(errors.FileError, "path", headline, [((), text)])
    replacing.status(target)
    for shard in _own(target, _old_shards(target)):
        replacing.status(shard)


def _old_shards(target: str) -> list[str]:
    """The paths of the shards of the old index."""
    try:
        with open(target, "rb") as file:
            old = index.read(file).weight_map
    except (FileNotFoundError, ValueError):
        return []
    paths = [os.path.join(os.path.dirname(target), name) for name in sorted(set(old.values()))]
    return [path for path in paths if os.path.exists(path)]


def _own(target: str, shards: Sequence[str]) -> list[str]:
    """The shards that have the names of this index: only these are replaced."""
    start = f"{index.stem(target)}-"
    return [x for x in shards if index.is_shard(x) and os.path.basename(x).startswith(start)]


def _replace(
    target: str,
    staged: str,
    lock: locking.DirectoryLock,
    shards: Sequence[Write],
    index_text: Callable[[list[str]], bytes],
) -> None:
    directory = os.path.dirname(target)
    with _journal(staged) as journal:
        new_mode = replacing.mode_of_new_file(os.path.join(staged, MODE))
        paths = [os.path.join(staged, str(i)) for i in range(len(shards))]
        for path, write in zip(paths, shards, strict=True):
            _write(path, write)
        is_locked = lock.acquire()
        old = _old_shards(target)
        names = _free_names(target, len(shards), is_locked)
        new_index = os.path.join(staged, INDEX)
        _write(new_index, partial(_write_text, index_text(names)))
        status = replacing.status(target)
        for path in paths:
            _set_permissions(path, new_mode, old)
        _set_permissions(new_index, new_mode, [] if status is None else [target])
        listed = dict(zip(names, map(abandoned.identity, paths), strict=True))
        for path in _own(target, old):
            with suppress(FileNotFoundError):
                listed[os.path.basename(path)] = abandoned.identity(path)
        journal.write(abandoned.journal_text(listed))
        journal.flush()
        os.fsync(journal.fileno())
        locking.sync(staged)
        for path, name in zip(paths, names, strict=True):
            os.rename(path, os.path.join(directory, name))
        locking.sync(directory)
        os.replace(new_index, target)
        with replacing.in_place(target):
            locking.sync(directory)


def _journal(staged: str) -> BinaryIO:
    """A new directory with an empty journal, locked so that no other writer removes them."""
    while True:
        os.mkdir(staged, 0o700)
        # Another writer may have removed the directory before the journal was locked.
        with suppress(FileNotFoundError):
            return locking.locked_file(os.path.join(staged, JOURNAL))


def _write(path: str, write: Write) -> None:
    opener = partial(os.open, mode=0o600)
    with open(path, "xb", opener=opener) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _write_text(text: bytes, file: BinaryIO) -> None:
    file.write(text)


def _free_names(target: str, count: int, is_locked: bool) -> list[str]:
    """The names of Hugging Face, if no shard has them; otherwise names with a random part.

    Without a lock, another writer could take the same names in the same moment.
    """
    stem, directory = index.stem(target), os.path.dirname(target)
    names = index.shard_names(stem, count)
    if is_locked and not any(os.path.lexists(os.path.join(directory, x)) for x in names):
        return names
    return index.shard_names(stem, count, secrets.token_hex(4))


def _set_permissions(path: str, new_mode: int, old: Sequence[str]) -> None:
    """Give a file the permissions that all old files give, or `new_mode` if there are none."""
    found = []
    for x in old:
        # Without locks, another writer may have removed old files: their permissions are unknown.
        with suppress(FileNotFoundError):
            found.append((x, os.stat(x)))
    owners = {(status.st_uid, status.st_gid, replacing.acl(x)) for x, status in found}
    most = 0o777 if len(owners) <= 1 else 0o700
    for _, status in found:
        most &= stat.S_IMODE(status.st_mode)
    with locking.Descriptor(path, os.O_RDWR) as file:
        if found:
            replacing.set_permissions(file.fileno(), new_mode, *found[0], most)
        else:
            replacing.set_permissions(file.fileno(), 0o600 if old else new_mode, path, None)
        os.fsync(file.fileno())


def _end(staged: str, lock: locking.DirectoryLock) -> None:
    if os.path.exists(staged):
        lock.acquire()
        with suppress(OSError):  # if this fails, the next save repeats it
            abandoned.settle(staged)
