"""Small file systems in memory, in a mount namespace of their own. Only root can mount them."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NEW_NAMESPACE, _PRIVATE, _RECURSIVE = 0x20000, 1 << 18, 1 << 14


def _mount(directory: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(_NEW_NAMESPACE),
        libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None),
        libc.mount(b"tmpfs", directory.encode(), b"tmpfs", 0, options.encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "cannot mount")


def called_in(options: str, call: Callable[..., None], *arguments: Any) -> str | None:
    """Call a function in a child, with the directory of a file system that has these options.

    Returns what the function raised, or None.
    """
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as directory:
        pid = os.fork()
        if pid == 0:
            try:
                _mount(directory, options)
                call(Path(directory), *arguments)
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}"[:4000].encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as stream:
            text = stream.read()
        os.waitpid(pid, 0)
    return text or None


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    return called_in("size=4k", lambda directory: None) is None
