"""Texts for token stores: plain text, JSON lines and Parquet, compressed or not, whole files or parts of large ones."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zstandard

from vllm_specplug.errors import DatastoreError
from vllm_specplug.stores.format import shards_folder
from vllm_specplug.stores.writer import PIECE_CHARS, Piece, split_text

RECORD_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSION_SUFFIXES = (".gz", ".zst")
EXPANSION = 4
"""Approximate bytes of text for a byte of a compressed file; only used to cut work into parts of similar size."""

READ_ERRORS = (UnicodeDecodeError, OSError, EOFError, zlib.error, zstandard.ZstdError)


class Slice(NamedTuple):
    """A part of a file: the lines that start in these bytes, or these row groups of Parquet.

    Attributes:
        path: the file.
        start: first byte or row group.
        stop: first byte or row group behind the part; None: to the end.
    """

    path: Path
    start: int = 0
    stop: int | None = None


@dataclass
class Sources:
    """The texts of some slices, read one after the other, and how far reading has come.

    Attributes:
        slices: in order; None is standard input.
        field: name of the text field of JSON lines and Parquet.
        num_bytes: size of all slices as they lie on disk.
        bytes_done: bytes of them that were read.
        num_skipped: files, or slices of them, that were left out because they are not UTF-8 text, or unreadable.
        lf_only: write line ends of Windows (``\\r\\n``) as ``\\n``.
        num_lines, num_windows_lines: line ends that were read, and those of Windows among them.
    """

    slices: Sequence[Slice | None]
    field: str
    num_bytes: int = 0
    bytes_done: int = 0
    num_skipped: int = 0
    lf_only: bool = False
    num_lines: int = 0
    num_windows_lines: int = 0

    def pieces(self) -> Iterator[Piece]:
        """Every document's text, in pieces."""
        for piece in self._pieces():
            num_windows_lines = piece.text.count("\r\n")
            self.num_lines += piece.text.count("\n")
            self.num_windows_lines += num_windows_lines
            if self.lf_only and num_windows_lines:
                piece = piece._replace(text=piece.text.replace("\r\n", "\n"))
            yield piece

    def _pieces(self) -> Iterator[Piece]:
        for part in self.slices:
            before = self.bytes_done
            if part is None:
                yield from self._standard_input()
                continue
            yield from self._slice(part, before)
            self.bytes_done = before + size_of(part)

    def _standard_input(self) -> Iterator[Piece]:
        try:
            yield from _plain(sys.stdin.buffer)
        except UnicodeDecodeError as error:
            raise DatastoreError(f"standard input is not UTF-8 text: {error}") from error

    def _slice(self, part: Slice, bytes_before: int) -> Iterator[Piece]:
        kind = kind_of(part.path)
        if kind == "parquet":
            yield from _parquet_texts(part, self.field)
            return
        if kind == "text" and not is_text(part):
            self.num_skipped += 1
            return
        with _open(part) as (raw, stream):
            pieces = _json_lines(part, stream, self.field) if kind == "jsonl" else _plain(stream)
            for piece in pieces:
                self.bytes_done = bytes_before + raw.tell() - part.start
                yield piece


def kind_of(path: Path) -> str:
    """Kind of a file by its name without a suffix of compression: "parquet", "jsonl" or "text"."""
    name = path.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return "parquet" if name.endswith(".parquet") else "jsonl" if name.endswith(RECORD_SUFFIXES) else "text"


def is_compressed(path: Path) -> bool:
    """Whether the file must be decompressed from its start."""
    return path.suffix.lower() in COMPRESSION_SUFFIXES


def size_of(part: Slice) -> int:
    """Approximate bytes of a slice on disk; of Parquet's row groups, the bytes that their metadata state."""
    if part.start == 0 and part.stop is None:
        return part.path.stat().st_size
    if kind_of(part.path) == "parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(part.path)
        stop = metadata.num_row_groups if part.stop is None else part.stop
        return sum(metadata.row_group(index).total_byte_size for index in range(part.start, stop))
    return (part.path.stat().st_size if part.stop is None else part.stop) - part.start


def plan_units(paths: Sequence[Path], unit_bytes: int) -> list[list[Slice]]:
    """Cut files into units of about ``unit_bytes`` bytes of text each, in order.

    Text and JSON lines are cut between lines and Parquet between row groups; compressed files stay whole, and so does a
    line.

    Args:
        paths: files to read, each once.

    Raises:
        DatastoreError: a Parquet file cannot be read.
    """
    units: list[list[Slice]] = [[]]
    room = unit_bytes
    for part, num_bytes in _parts(paths, unit_bytes):
        if units[-1] and num_bytes > room:
            units.append([])
            room = unit_bytes
        units[-1].append(part)
        room -= num_bytes
    return [unit for unit in units if unit]


def _parts(paths: Sequence[Path], unit_bytes: int) -> Iterator[tuple[Slice, int]]:
    """Slices with their bytes of text, no larger than a unit if the file can be cut."""
    for path in paths:
        size = path.stat().st_size
        if kind_of(path) == "parquet":
            yield from _row_groups(path, unit_bytes)
        elif is_compressed(path):
            yield Slice(path), size * EXPANSION
        elif size <= unit_bytes:
            yield Slice(path), size
        else:
            count = -(-size // unit_bytes)
            # Not at equal parts of the size: where a small change is made, the parts before it stay what they were.
            cuts = [unit_bytes * index for index in range(count)]
            for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
                yield Slice(path, start, stop), (size if stop is None else stop) - start


def _row_groups(path: Path, unit_bytes: int) -> Iterator[tuple[Slice, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatastoreError(f"cannot read {path}: {error}") from error
    start = num_bytes = 0
    for index in range(metadata.num_row_groups):
        group_bytes = metadata.row_group(index).total_byte_size
        if num_bytes and num_bytes + group_bytes > unit_bytes:
            yield Slice(path, start, index), num_bytes
            start, num_bytes = index, 0
        num_bytes += group_bytes
    yield Slice(path, start, None) if start else Slice(path), num_bytes


class _Part(io.RawIOBase):
    """The next ``num_bytes`` bytes of an open file, as a stream."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file = file
        self._left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _line_start(file: IO[bytes], at: int) -> int:
    """First byte of the first line that begins at byte ``at`` or later."""
    if at == 0:
        return 0
    file.seek(at - 1)
    while chunk := file.read(PIECE_CHARS):  # not readline: a file may be one line, larger than memory
        if (found := chunk.find(b"\n")) >= 0:
            return file.tell() - len(chunk) + found + 1
    return file.tell()


@contextlib.contextmanager
def unpacked(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The contents of an open file: decompressed when the name of ``path`` ends in ``.gz`` or ``.zst``."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(raw) as stream:
            yield cast("IO[bytes]", stream)
    elif suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as stream:
            yield io.BufferedReader(stream)
    else:
        yield raw


@contextlib.contextmanager
def _open(part: Slice) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file: yields it as it is on disk, and a stream of the decompressed slice."""
    with part.path.open("rb") as raw:
        if part.path.suffix.lower() in COMPRESSION_SUFFIXES or (part.start == 0 and part.stop is None):
            with unpacked(raw, part.path) as stream:
                yield raw, stream
        else:
            stop = raw.seek(0, io.SEEK_END) if part.stop is None else _line_start(raw, part.stop)
            start = _line_start(raw, part.start)
            raw.seek(start)
            yield raw, io.BufferedReader(_Part(raw, max(stop - start, 0)))


def is_text(part: Slice) -> bool:
    """True for UTF-8 text without null characters; reads all of it, so that no half of a file gets into a store."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(part) as (_, stream):
            while chunk := stream.read(PIECE_CHARS):
                if "\0" in decoder.decode(chunk):
                    return False
            decoder.decode(b"", final=True)
    except READ_ERRORS:
        return False
    return True


def _plain(stream: IO[bytes]) -> Iterator[Piece]:
    # newline="": line ends are part of the text, and tokens must be those that the model saw.
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    try:
        yield from split_text(reader.read)
    finally:
        reader.detach()


def _json_lines(part: Slice, stream: IO[bytes], field: str) -> Iterator[Piece]:
    def place(number: int) -> str:
        return f"{part.path} line {_lines_before(part) + number}"

    try:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatastoreError(f"{place(number)} is not JSON: {error}") from error
            texts = {k: v for k, v in record.items() if isinstance(v, str)} if isinstance(record, dict) else {}
            if field not in texts:
                raise DatastoreError(
                    f"{place(number)} has no text in field {field!r}; fields with text: "
                    f"{', '.join(texts) or 'none'} (choose one with --field)"
                )
            yield from split_text(io.StringIO(_whole_characters(texts[field]), newline="").read)
    except READ_ERRORS as error:
        raise DatastoreError(f"cannot read {part.path}: {error}") from error


def _lines_before(part: Slice) -> int:
    """Lines of a file before a slice; reads the file up to there."""
    count = 0
    with part.path.open("rb") as file:
        left = _line_start(file, part.start)
        file.seek(0)
        while left > 0 and (chunk := file.read(min(left, PIECE_CHARS))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parquet_texts(part: Slice, field: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            if field not in file.schema_arrow.names:
                raise DatastoreError(
                    f"{part.path} has no column {field!r}; it has: {', '.join(file.schema_arrow.names)} "
                    "(choose one with --field)"
                )
            groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
            for batch in file.iter_batches(batch_size=256, columns=[field], row_groups=list(groups)):
                for value in batch.column(0):
                    text = value.as_py()
                    if text is not None and not isinstance(text, str):
                        raise DatastoreError(f"column {field!r} of {part.path} holds {value.type}, not text")
                    yield from split_text(io.StringIO(text or "", newline="").read)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatastoreError(f"cannot read {part.path}: {error}") from error


def find_paths(inputs: Sequence[str], pattern: str, out: Path | None = None) -> list[Path | None]:
    """The files that ``inputs`` (files, folders, globs, "-") stand for, without repetition; None is standard input.

    Args:
        pattern: which files of a folder are read, at any depth; hidden files and folders are left out.
        out: store that is built from the files; if its own files are among the inputs, they are left out too.

    Raises:
        DatastoreError: an input stands for no file.
    """
    paths: dict[Path | None, Path | None] = {}
    for name in inputs:
        found: list[Path | None]
        path = Path(name).expanduser()  # a glob in quotes keeps its ~ from the shell
        if name == "-":
            found = [None]
        elif path.is_dir():
            found = [
                each
                for each in sorted(path.rglob(pattern))
                if each.is_file() and not any(part.startswith(".") for part in each.relative_to(path).parts)
            ]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
        if not found:
            what = f"no file of the folder {name} matches {pattern!r}" if path.is_dir() else f"there is no file {name}"
            raise DatastoreError(f"{what}: nothing to read")
        for each in found:
            if each is None or out is None or not _belongs_to(each, out):
                paths.setdefault(None if each is None else each.resolve(), each)
    if inputs and not paths:
        raise DatastoreError(f"{', '.join(inputs)}: only files of the store {out} itself, nothing to read")
    return list(paths.values())


def _belongs_to(path: Path, out: Path) -> bool:
    whole, store = path.resolve(), out.resolve()
    if whole == store or whole.parent == shards_folder(store):
        return True
    return whole.parent == store.parent and whole.name.startswith(f"{store.name}.partial-")


def whole(paths: Sequence[Path | None], field: str, lf_only: bool = False) -> Sources:
    """Sources that read whole files; None is standard input."""
    sizes = (path.stat().st_size for path in paths if path is not None)
    slices = [None if path is None else Slice(path) for path in paths]
    return Sources(slices, field, num_bytes=sum(sizes), lf_only=lf_only)


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer by folder or Hugging Face name.

    Raises:
        DatastoreError: transformers is missing, or cannot load the tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DatastoreError("tokenizers are loaded with transformers, which comes with vLLM: install it") from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged tokenizer files raise no narrower exception
        reason = str(error).strip().partition("\n")[0]
        raise DatastoreError(f"cannot load tokenizer {name!r} (a folder or a Hugging Face name): {reason}") from error


def vocab_size_of(tokenizer: Any) -> int:
    """Size of a tokenizer's vocabulary: one more than its largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1
