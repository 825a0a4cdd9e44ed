"""Remove what killed writers left in a directory: temporary files, and staged sets of shards.

A staged set is a directory with the new shards and a journal. The journal lists the old and the new
shards before the first of them is renamed. Whatever happened then, `settle` removes the listed
shards that no index refers to. A shard counts as listed only if it is still the same file.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress

from lars_tree._files import index, locking, names

PREFIX = ".lars_tree-"
TEMPORARY, STAGED = ".tmp", ".set"
JOURNAL, INDEX, MODE = "journal", "index", "mode"  # in a staged set; shards are numbered


def remove(directory: str) -> None:
    """Remove temporary files and staged sets whose writers were killed."""
    with os.scandir(directory) as entries:
        paths = [x.path for x in entries if x.name.startswith(PREFIX)]
    for path in paths:
        # Ignore files of other users, and files that are already gone.
        with suppress(OSError):
            if path.endswith(TEMPORARY):
                remove_file(path)
            elif path.endswith(STAGED):
                _remove_set(path)


def remove_file(path: str) -> None:
    """Remove a temporary file, unless its writer is running."""
    if locking.fcntl is None:
        os.unlink(path)
        return
    with locking.Descriptor(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        # The writer may have renamed the file in the meantime: check the name again.
        if locking.lock(file.fileno(), wait=False) and locking.is_at(path, file.fileno()):
            os.unlink(path)


def _remove_set(staged: str) -> None:
    if locking.fcntl is None:  # Windows: whether the writer is running is unknown
        return
    status = os.lstat(staged)
    # A link could lead to the files of others, and another user could list files of others.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    with suppress(OSError):
        os.rmdir(staged)  # only if it is empty: the writer was killed before it had a journal
        return
    journal = os.path.join(staged, JOURNAL)
    with locking.Descriptor(journal, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        if locking.lock(file.fileno(), wait=False) and locking.is_at(journal, file.fileno()):
            with locking.DirectoryLock(os.path.dirname(staged)) as directory:
                directory.acquire()
                settle(staged)


def settle(staged: str) -> None:
    """End a replacement of shards, whether or not the new index is in place.

    The caller holds the lock of the directory. If this is interrupted or raises an OSError, it can
    be repeated: the journal is removed after the shards.
    """
    directory, journal = os.path.dirname(staged), os.path.join(staged, JOURNAL)
    listed = _listed(journal)
    used = _referenced(directory) if listed else None
    if used is not None:
        _unlink_unused(directory, listed, used)
    with suppress(FileNotFoundError):
        for name in os.listdir(staged):
            if name.isdigit() or name in (INDEX, MODE):
                os.unlink(os.path.join(staged, name))
        os.unlink(journal)
    with suppress(FileNotFoundError):
        os.rmdir(staged)


def _unlink_unused(
    directory: str, listed: dict[str, list[int]], used: set[tuple[int, int]]
) -> None:
    """Remove the listed shards that are not used. An OSError is raised after all were tried."""
    failed: OSError | None = None
    for name, known in listed.items():
        path = os.path.join(directory, name)
        try:
            if identity(path) == known and _file(path) not in used:
                os.unlink(path)
        except FileNotFoundError:  # it was never renamed, or is already gone
            continue
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def identity(path: str) -> list[int]:
    """What tells a file from a later file of the same name."""
    status = os.lstat(path)
    return [status.st_ino, status.st_mtime_ns]


def journal_text(shards: dict[str, list[int]]) -> bytes:
    """The journal for these shards, given by name with their identity."""
    return json.dumps(shards).encode()


def _listed(journal: str) -> dict[str, list[int]]:
    """The shards in a journal; empty if it is incomplete: then no shard was renamed yet."""
    try:
        with open(journal, "rb") as file:
            found = names.parsed(file.read().decode())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(map(index.is_shard, found)):
        return {}
    return {name: x for name, x in found.items() if os.path.basename(name) == name}


def _referenced(directory: str) -> set[tuple[int, int]] | None:
    """The shards that the indexes in a directory refer to; None if an index is malformed."""
    found: set[tuple[int, int]] = set()
    for name in filter(index.is_index, os.listdir(directory)):
        try:
            with open(os.path.join(directory, name), "rb") as file:
                shards = set(index.read(file).weight_map.values())
        except (FileNotFoundError, ValueError):
            return None
        for shard in shards:
            with suppress(FileNotFoundError):  # it is missing
                found.add(_file(os.path.join(directory, shard)))
    return found


def _file(path: str) -> tuple[int, int]:
    """The file that this name leads to. An index may use a link, or another case of letters."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
