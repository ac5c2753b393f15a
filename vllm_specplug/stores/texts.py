"""Texts for token stores: plain text, records and chats, whole files or parts of large ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from vllm_specplug.errors import DatastoreError, InputError
from vllm_specplug.reading import files, records
from vllm_specplug.reading.chats import is_chat, messages_of
from vllm_specplug.reading.files import READ_ERRORS, is_compressed, is_pipe
from vllm_specplug.stores.format import shards_folder
from vllm_specplug.stores.writer import PIECE_CHARS, Piece, split_text

EXPANSION = 4
"""Approximate bytes of text for a byte of a compressed file; only used to cut work into parts of similar size."""
DEFAULT_FIELD = "text"
ALSO_TEXT = ("json", "csv", "tsv")
"""Kinds of files that are one text each unless the user names a field: sources have such files too."""
STANDARD_INPUT = Path("-")
NO_FIELDS = "plain text, which has no fields"

Render = Callable[[Sequence[Any]], str]
"""Text of a chat's messages, as the model's template writes it."""


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
class PassedOver:
    """What was not read, and why.

    Attributes:
        files: numbers of files (of slices of large ones) by what they are.
        num_nulls: records whose field is null, or an empty chat.
        num_wrong: records that are wrong.
        first_wrong: place of the first of them, and what is wrong.
    """

    files: Counter[str] = dataclasses.field(default_factory=Counter)
    num_nulls: int = 0
    num_wrong: int = 0
    first_wrong: str = ""

    def add(self, other: PassedOver) -> None:
        """Count what somebody else passed over."""
        self.files.update(other.files)
        self.num_nulls += other.num_nulls
        self.num_wrong += other.num_wrong
        self.first_wrong = self.first_wrong or other.first_wrong

    def wrong(self, what: str) -> None:
        """Count a record that is wrong; ``what`` begins with its place."""
        self.num_wrong += 1
        self.first_wrong = self.first_wrong or what

    def __str__(self) -> str:
        """In words; "" if nothing was passed over."""
        said = []
        if num_files := sum(self.files.values()):
            kinds = "; ".join(f"{number:,} {what}" for what, number in self.files.most_common())
            said.append(f"left out {num_files:,} files: {kinds}")
        if self.num_nulls:
            said.append(f"passed over {self.num_nulls:,} records without a value")
        if self.num_wrong:
            said.append(f"passed over {self.num_wrong:,} wrong records, the first: {self.first_wrong}")
        return "; ".join(said)


def total(parts: Iterable[PassedOver]) -> PassedOver:
    """What all parts passed over."""
    together = PassedOver()
    for part in parts:
        together.add(part)
    return together


@dataclass
class Sources:
    """The texts of some slices, read one after the other, and how far reading has come.

    Attributes:
        slices: in order; None is standard input.
        field: name of the field of records that holds text or a chat, if the user named one. Then all files must have
            records, and pipes and standard input are JSON lines; without it JSON lines and Parquet have "text".
        render: makes text of a chat; None refuses chats.
        num_bytes: size of all slices as they lie on disk.
        bytes_done: bytes of them that were read.
        passed_over: what was left out.
        lf_only: write line ends of Windows (``\\r\\n``) as ``\\n``.
        num_lines, num_windows_lines: line ends that were read, and those of Windows among them.
    """

    slices: Sequence[Slice | None]
    field: str | None
    render: Render | None = None
    num_bytes: int = 0
    bytes_done: int = 0
    passed_over: PassedOver = dataclasses.field(default_factory=PassedOver)
    lf_only: bool = False
    num_lines: int = 0
    num_windows_lines: int = 0

    def pieces(self) -> Iterator[Piece]:
        """Every document's text, in pieces.

        Raises:
            InputError: a file cannot be read, or not one of its records is right.
        """
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
                yield from self._stream(Slice(STANDARD_INPUT), sys.stdin.buffer)
                continue
            try:
                yield from self._slice(part, before)
            except READ_ERRORS as error:
                raise InputError(f"cannot read {part.path}: {error}") from error
            self.bytes_done = before + size_of(part)

    def _slice(self, part: Slice, before: int) -> Iterator[Piece]:
        kind = self._kind(part.path)
        if kind == "parquet":
            yield from self._parquet(part)
            return
        if kind == "text" and (what := self._unfit(part)):
            self.passed_over.files[what] += 1
            return
        with open_slice(part) as (raw, stream):
            for piece in self._stream(part, stream):
                if not is_pipe(part.path):
                    self.bytes_done = before + raw.tell() - part.start
                yield piece

    def _kind(self, path: Path) -> str:
        if path == STANDARD_INPUT or is_pipe(path):
            return "text" if self.field is None else "lines"
        kind = files.kind_of(path)
        return "text" if kind in ALSO_TEXT and self.field is None else kind

    def _unfit(self, part: Slice) -> str | None:
        """Why a file of plain text cannot be read, in words."""
        if self.field is not None:
            return NO_FIELDS
        return None if is_pipe(part.path) else no_text(part)

    def _stream(self, part: Slice, raw: IO[bytes]) -> Iterator[Piece]:
        kind = self._kind(part.path)
        with files.unpacked(raw, part.path) as stream:
            if what := files.foreign(stream.peek(files.HEAD_BYTES)[: files.HEAD_BYTES]):
                raise InputError(f"{_name(part)} is {what}")
            try:
                if kind == "text":
                    yield from _plain(stream)
                else:
                    yield from self._texts(part, records.stream_records(stream, kind))
            except UnicodeDecodeError as error:
                raise InputError(f"{_name(part)} is {files.NO_UTF8} ({error})") from error
            except InputError as error:
                raise InputError(files.named(error, Path(_name(part)))) from error

    def _parquet(self, part: Slice) -> Iterator[Piece]:
        import pyarrow.parquet

        name = self.field or DEFAULT_FIELD
        with pyarrow.parquet.ParquetFile(part.path) as file:
            names, num_groups = file.schema_arrow.names, file.num_row_groups
        if name not in names:
            raise InputError(f"{part.path} has no column {name!r}; it has: {', '.join(names)} (--field chooses one)")
        groups = range(part.start, num_groups if part.stop is None else part.stop)
        yield from self._texts(part, records.parquet_records(part.path, [name], list(groups)))

    def _texts(self, part: Slice, found: Iterable[records.Record]) -> Iterator[Piece]:
        """Texts of records.

        Raises:
            InputError: some are wrong, and none is right.
        """
        wrong = PassedOver()
        is_any_right = False
        for place, value, problem in found:
            try:
                text = _refused(problem) if problem else self._text(value)
            except InputError as error:
                wrong.wrong(f"{_place(part, place)} {error}")
                continue
            is_any_right = True
            if text is None:
                self.passed_over.num_nulls += 1
            else:
                yield from split_text(io.StringIO(records.whole_characters(text), newline="").read)
        if wrong.num_wrong and not is_any_right:
            raise InputError(wrong.first_wrong)
        self.passed_over.add(wrong)

    def _text(self, record: Any) -> str | None:
        """Text of a record; None if it has none.

        Raises:
            InputError: what is wrong with the record, to be read behind its place.
        """
        name = self.field or DEFAULT_FIELD
        fields = record if isinstance(record, dict) else {}
        if name not in fields:
            with_text = [key for key, value in fields.items() if isinstance(value, str) or is_chat(value)]
            raise InputError(
                f"has no text in field {name!r}; fields with text: {', '.join(with_text) or 'none'} (choose one with "
                "--field)"
            )
        value = fields[name]
        if value is None or value == []:
            return None
        if isinstance(value, str):
            return value
        if isinstance(value, records.Unreadable):
            raise InputError(f"field {name!r} {value.reason}")
        if self.render is not None and is_chat(value):
            return self.render(messages_of(value))
        raise InputError(f"field {name!r} holds {type(value).__name__}, not text")


def _refused(problem: str) -> str:
    raise InputError(problem)


def _name(part: Slice) -> str:
    return "standard input" if part.path == STANDARD_INPUT else str(part.path)


def _place(part: Slice, place: str) -> str:
    """Name of the file, and the place of a record in the whole file; ``place`` is that in the slice."""
    what, _, number = place.partition(" ")
    if part.start and what == "line":
        place = f"line {_lines_before(part) + int(number)}"
    elif part.start:
        place = f"{place} from row group {part.start}"
    return f"{_name(part)} {place}"


def _lines_before(part: Slice) -> int:
    """Lines of a file before a slice; reads the file up to there."""
    count = 0
    with files.open_raw(part.path) as file:
        left = _line_start(file, part.start)
        file.seek(0)
        while left > 0 and (chunk := file.read(min(left, PIECE_CHARS))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def size_of(part: Slice) -> int:
    """Approximate bytes of a slice on disk; of Parquet's row groups, the bytes that their metadata state."""
    if part.start == 0 and part.stop is None:
        return part.path.stat().st_size
    if files.kind_of(part.path) == "parquet":
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(part.path)
        stop = metadata.num_row_groups if part.stop is None else part.stop
        return sum(metadata.row_group(index).total_byte_size for index in range(part.start, stop))
    return (part.path.stat().st_size if part.stop is None else part.stop) - part.start


def plan_units(paths: Sequence[Path], unit_bytes: int, field: str | None = None) -> list[list[Slice]]:
    """Cut files into units of about ``unit_bytes`` bytes of text each, in order.

    Text and JSON lines are cut between lines and Parquet between row groups; compressed files stay whole, and so does a
    line.

    Args:
        paths: files to read, each once.
        field: as in :class:`Sources`.

    Raises:
        InputError: a Parquet file cannot be read.
    """
    units: list[list[Slice]] = [[]]
    room = unit_bytes
    for part, num_bytes in _parts(paths, unit_bytes, field):
        if units[-1] and num_bytes > room:
            units.append([])
            room = unit_bytes
        units[-1].append(part)
        room -= num_bytes
    return [unit for unit in units if unit]


def _parts(paths: Sequence[Path], unit_bytes: int, field: str | None) -> Iterator[tuple[Slice, int]]:
    """Slices with their bytes of text, no larger than a unit if the file can be cut."""
    for path in paths:
        size = path.stat().st_size
        if files.kind_of(path) == "parquet":
            yield from _row_groups(path, unit_bytes)
        elif is_compressed(path):
            yield Slice(path), size * EXPANSION
        elif size <= unit_bytes or not _may_be_cut(path, field):
            yield Slice(path), size
        else:
            count = -(-size // unit_bytes)
            # Not at equal parts of the size: where a small change is made, the parts before it stay what they were.
            cuts = [unit_bytes * index for index in range(count)]
            for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
                yield Slice(path, start, stop), (size if stop is None else stop) - start


def _may_be_cut(path: Path, field: str | None) -> bool:
    """Whether a file can be cut at any line: a JSON list, or CSV with texts of several lines, cannot."""
    kind = files.kind_of(path)
    if kind in ALSO_TEXT:
        return field is None
    if kind == "text":
        return True
    with files.open_raw(path) as raw, files.unpacked(raw, path) as stream:
        return not records.is_list(stream)


def _row_groups(path: Path, unit_bytes: int) -> Iterator[tuple[Slice, int]]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path}: {error}") from error
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
def open_slice(part: Slice) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file, and a stream of the slice, both as they are on disk."""
    with files.open_raw(part.path) as raw:
        if part.start == 0 and part.stop is None:
            yield raw, raw
            return
        stop = raw.seek(0, io.SEEK_END) if part.stop is None else _line_start(raw, part.stop)
        start = _line_start(raw, part.start)
        raw.seek(start)
        yield raw, io.BufferedReader(_Part(raw, max(stop - start, 0)))


def no_text(part: Slice) -> str | None:
    """What a slice is, in words, if it is no text; reads all of it, so that no half of a file gets into a store."""
    try:
        with open_slice(part) as (_, packed), files.unpacked(packed, part.path) as stream:
            return files.no_text(stream)
    except (*READ_ERRORS, InputError) as error:
        return f"damaged, or cannot be read ({error})"


def _plain(stream: io.BufferedReader) -> Iterator[Piece]:
    # newline="": line ends are part of the text, and tokens must be those that the model saw.
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    try:
        yield from split_text(reader.read)
    finally:
        reader.detach()


def find_paths(inputs: Sequence[str], pattern: str, field: str | None = None, out: Path | None = None) -> list[Path]:
    """The files that ``inputs`` (files, pipes, folders, globs, "-") stand for, as :func:`.reading.files.find` does.

    Args:
        field: as in :class:`Sources`.
        out: store that is built from the files; if its own files are among the inputs, they are left out too.

    Returns:
        Paths, each once; :data:`STANDARD_INPUT` is standard input.

    Raises:
        InputError: an input stands for no file, or a file that the user named has no fields, and ``field`` is given.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        each = [(STANDARD_INPUT, True)] if name == str(STANDARD_INPUT) else files.find([name], pattern)
        for path, is_named in each:
            if out is not None and _belongs_to(path, out):
                continue
            if field is not None and is_named and path.is_file() and files.kind_of(path) == "text":
                raise InputError(f"{path} is {NO_FIELDS}: leave --field {field} out, or name other files")
            found.setdefault(path.resolve(), path)
    if inputs and not found:
        raise InputError(f"{', '.join(inputs)}: only files of the store {out} itself, nothing to read")
    return list(found.values())


def can_be_read_again(paths: Sequence[Path]) -> bool:
    """Whether none of the paths is standard input or a pipe."""
    return not any(path == STANDARD_INPUT or is_pipe(path) for path in paths)


def _belongs_to(path: Path, out: Path) -> bool:
    whole, store = path.resolve(), out.resolve()
    if whole == store or whole.parent == shards_folder(store):
        return True
    return whole.parent == store.parent and whole.name.startswith(f"{store.name}.partial-")


def whole(paths: Sequence[Path], field: str | None, render: Render | None = None, lf_only: bool = False) -> Sources:
    """Sources that read whole files, as :func:`find_paths` found them."""
    sizes = (path.stat().st_size for path in paths if path != STANDARD_INPUT)
    slices = [None if path == STANDARD_INPUT else Slice(path) for path in paths]
    return Sources(slices, field, render, num_bytes=sum(sizes), lf_only=lf_only)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer by folder or Hugging Face name.

    Args:
        trust_remote_code: run code that the folder has for its tokenizer.

    Raises:
        DatastoreError: transformers is missing, or cannot load the tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DatastoreError("tokenizers are loaded with transformers, which comes with vLLM: install it") from error
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged tokenizer files raise no narrower exception
        reason = str(error).strip().partition("\n")[0]
        hint = "; give --trust-remote-code if you trust it" if "trust_remote_code" in str(error) else ""
        raise DatastoreError(
            f"cannot load tokenizer {name!r} (a folder or a Hugging Face name): {reason}{hint}"
        ) from error


def vocab_size_of(tokenizer: Any) -> int:
    """Size of a tokenizer's vocabulary: one more than its largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1
