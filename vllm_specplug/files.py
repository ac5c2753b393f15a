"""Opening and replacing files whose paths come from people: nothing hangs, and nobody meets half a file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Anything else is refused at once: the open of a pipe waits for a writer, and a device may never end.

    Raises:
        OSError: there is no such file, it cannot be read, or it is no file but a folder, pipe, device or socket. Its
            ``strerror`` says which, and its ``filename`` is the path.
    """
    _refuse_unless_regular(os.stat(path), path)  # before the open, which a device may take as an order
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_unless_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_unless_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))


@contextlib.contextmanager
def replacing(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """Write a file that appears at ``path`` when the block ends, whole and on disk, or not at all.

    Args:
        path: a file there is replaced; its folder must exist.
        mode: permissions of the file, such as 0o600.

    Raises:
        OSError: it cannot be written. What was at ``path`` is still there.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)  # of a killed process with this number, maybe with other permissions
    try:
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode | 0o200), "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, on file systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
