"""Files that users bring: found, opened and decompressed; and what a file is that is no UTF-8 text."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
import zstandard

from vllm_specplug.errors import InputError
from vllm_specplug.files import open_regular
from vllm_specplug.log import logger

KINDS = {
    ".parquet": "parquet", ".pq": "parquet",
    ".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".jl": "lines",
    ".json": "json", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
"""Kinds of files by suffix; everything else is "text"."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ_ERRORS = (
    UnicodeDecodeError, OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException,
)  # fmt: skip
"""What reading a damaged file raises."""
PIPE_PATIENCE_S = 5.0
HEAD_BYTES = 4096
LONGEST_WINDOW = 2**31
"""Bytes that a stream of zstd may look back, as ``zstd --long=31`` writes it."""

_MAGIC = {
    b"\x1f\x8b": "compressed with gzip, which a name ending in .gz says",
    b"BZh": "compressed with bzip2, which a name ending in .bz2 says",
    b"\xfd7zXZ\x00": "compressed with xz, which a name ending in .xz says",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, which a name ending in .zst says",
    b"PAR1": "Parquet, which a name ending in .parquet says",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"\xff\xfe\x00\x00": "UTF-32 text: convert it with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8",
}
NO_UTF8 = "no UTF-8 text, perhaps Latin-1: convert it with iconv -f LATIN1 -t UTF-8"


def kind_of(path: Path) -> str:
    """Kind of a file by its name without a suffix of compression: a value of :data:`KINDS`, or "text"."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return KINDS.get(Path(name).suffix, "text")


def is_compressed(path: Path) -> bool:
    """Whether the file must be decompressed from its start."""
    return path.suffix.lower() in COMPRESSIONS


def is_pipe(path: Path) -> bool:
    """Whether the path is a pipe, which can be read once: ``<(zcat x)`` in a shell."""
    return path.is_fifo()


def named(error: BaseException, path: Path) -> str:
    """What an error says, with the path in front of it unless it has the path already."""
    return str(error) if str(path) in str(error) else f"{path} {error}"


def foreign(head: bytes) -> str | None:
    """What a file is, in words, if its first bytes say that it is no UTF-8 text; None if they do not."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    few, many = sorted((head[::2].count(0), head[1::2].count(0)))
    if many > 0.3 * len(head) and few < 0.05 * len(head):
        return "UTF-16 text: convert it with iconv -f UTF-16LE -t UTF-8 (or UTF-16BE)"
    return "binary, not text" if b"\0" in head else None


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def open_raw(path: Path) -> IO[bytes]:
    """Open a file or a pipe as it is; a pipe that nobody writes to is told after a few seconds.

    Raises:
        OSError: it cannot be opened, or is something else, such as a folder or a device.
    """
    if not is_pipe(path):
        return open_regular(path)
    if path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) and path.name.isdecimal():
        return os.fdopen(os.dup(int(path.name)), "rb")  # opened anew, a pipe whose writer has ended would wait for ever
    timer = threading.Timer(PIPE_PATIENCE_S, logger.warning, ["%s is a pipe, and nobody writes to it yet", path])
    timer.daemon = True
    timer.start()
    try:
        return path.open("rb")
    finally:
        timer.cancel()


@contextlib.contextmanager
def unpacked(raw: IO[bytes], path: Path) -> Iterator[io.BufferedReader]:
    """The contents of an open file from its place on, decompressed if the name of ``path`` says so.

    A byte order mark of UTF-8 at the start is left out.
    """
    suffix = path.suffix.lower()
    with contextlib.ExitStack() as stack:
        stream: Any = raw
        if suffix == ".gz":
            stream = stack.enter_context(gzip.open(raw))
        elif suffix == ".bz2":
            stream = stack.enter_context(bz2.open(raw))
        elif suffix == ".xz":
            stream = stack.enter_context(lzma.open(raw))
        elif suffix == ".zst":
            unpacker = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
            stream = stack.enter_context(unpacker.stream_reader(raw, read_across_frames=True, closefd=False))
        reader = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream))
        if reader.peek(3).startswith(codecs.BOM_UTF8):
            reader.read(3)
        yield reader


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The decompressed contents of a file that must be UTF-8 text, without a byte order mark.

    Raises:
        InputError: its first bytes say that it is something else.
    """
    with open_raw(path) as raw, unpacked(raw, path) as stream:
        if what := foreign(stream.peek(HEAD_BYTES)[:HEAD_BYTES]):
            raise InputError(f"{path} is {what}")
        yield stream


def no_text(stream: io.BufferedReader) -> str | None:
    """What a stream is, in words, if it is no UTF-8 text without null characters; reads all of it. None for text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        if what := foreign(stream.peek(HEAD_BYTES)[:HEAD_BYTES]):
            return what
        while chunk := stream.read(2**20):
            if "\0" in decoder.decode(chunk):
                return "binary, not text"
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return NO_UTF8
    except READ_ERRORS as error:
        return f"damaged, or cannot be read ({error})"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find(inputs: Sequence[str], pattern: str = "*", hidden: tuple[str, ...] = (".",)) -> list[tuple[Path, bool]]:
    """The files that ``inputs`` (files, pipes, folders, globs) stand for, each once, under the names they have there.

    A link keeps its name, which says the kind of file; linked folders are entered, each once.

    Args:
        pattern: which files of a folder are read, at any depth.
        hidden: first characters of files and folders inside a folder that are left out.

    Returns:
        Paths in order, and of each whether the user named it itself.

    Raises:
        InputError: an input stands for no file.
    """
    found: dict[Path, tuple[Path, bool]] = {}
    for name in inputs:
        path = Path(name).expanduser()  # a glob in quotes keeps its ~ from the shell
        if path.is_dir():
            each = [(file, False) for file in _inside(path, pattern, hidden)]
        elif path.is_file() or is_pipe(path):
            each = [(path, True)]
        elif path.exists():
            raise InputError(f"{name} is a device or a socket, not a file: nothing to read")
        else:
            each = [(Path(file), False) for file in sorted(glob.glob(str(path), recursive=True))]
            each = [(file, named) for file, named in each if file.is_file()]
        if not each:
            what = f"no file of the folder {name} matches {pattern!r}" if path.is_dir() else f"there is no file {name}"
            raise InputError(f"{what}: nothing to read")
        for file, is_named in each:
            found.setdefault(file.resolve(), (file, is_named))
    return list(found.values())


def _inside(folder: Path, pattern: str, hidden: tuple[str, ...]) -> list[Path]:
    above = {folder.resolve(), *folder.resolve().parents}
    roots = [folder]
    for root in roots:  # grows
        for where, names, _ in os.walk(root):
            for link in (path for name in names if (path := Path(where, name)).is_symlink()):
                if (real := link.resolve()) not in above:
                    above.add(real)
                    roots.append(link)
    files = (file for root in roots for file in root.rglob(pattern))
    return sorted(
        file
        for file in set(files)
        if file.is_file() and not any(part.startswith(hidden) for part in file.relative_to(folder).parts)
    )
