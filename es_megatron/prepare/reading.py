"""The entries of one file, whatever its form: lines or an array of JSON, rows of Parquet, or one plain text.

An entry that is no document comes with what is wrong with it: whoever reads decides whether that is an error. Damage
that hides where the next entry begins always is one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from es_megatron.errors import DataError
from es_megatron.prepare.unpacking import PACKED, pyarrow, unpacked

Form = Literal["lines", "array", "parquet", "text"]
Problem = Literal[
    "not UTF-8", "not JSON", "no JSON object", "no such field", "null", "not a string", "NUL characters", "too long"
]

LINES = (".jsonl", ".ndjson", ".json")
"""Endings of files with one JSON object a line, or one array of them; in any case, compressed or not."""

TEXT = (".txt", ".md", ".rst")
"""Endings of files that are one document of plain text each, whatever they begin with."""

PARQUET = b"PAR1"
LARGEST = 10**9
"""Bytes of the largest document: one that a file of a few kilobytes unpacks to must not take all memory."""

_HEAD = 1 << 16
_ROWS = 1_000
_LONGEST_WORD = 16  # more than `-Infinity` and any escape has: one that is cut fails closer to the end than this
_BOM = codecs.BOM_UTF8
_JSON = re.compile(rb"\s*(\{|\[\s*\{|\[\s*\Z)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RULES: dict[Problem, str] = {
    "not UTF-8": "must be UTF-8, but is not",
    "not JSON": "must be a JSON object, but is not",
    "no JSON object": "must be a JSON object, but is not",
    "no such field": "must have a string under `{key}`, but has {told} instead",
    "null": "must have a string under `{key}`, but has null there",
    "not a string": "must have a string under `{key}`, but has {told} there",
    "NUL characters": "must be text, but holds NUL characters",
    "too long": f"must be at most {LARGEST:,} bytes long, but is not",
}


class Entry(NamedTuple):
    """One entry of a file."""

    where: str
    """Its place: `Line 3 of ...`."""

    values: dict[str, Any]
    """Its fields; of plain text, the one that was asked for. Empty where there is a problem."""

    problem: Problem | None = None
    """What keeps it from being a document."""

    told: str = ""
    """More of the problem."""

    marked: bool = False
    """A byte-order mark stood before it, and was dropped."""


def text_of(entry: Entry, key: str) -> Entry:
    """The entry with a string under `key` and nothing wrong, or with what is wrong with it."""
    if entry.problem is not None:
        return entry
    value = entry.values.get(key)
    if isinstance(value, str):
        if "\0" in value:
            return entry._replace(problem="NUL characters")
        if _SURROGATE.search(value):  # JSON may spell half a surrogate pair, which UTF-8 and the tokenizer cannot
            return entry._replace(values={**entry.values, key: _SURROGATE.sub("\ufffd", value)})
        return entry
    if key in entry.values:
        return entry._replace(problem="null" if value is None else "not a string", told=type(value).__name__)
    return entry._replace(problem="no such field", told=f"{sorted(entry.values)[:10]}")


def refusal(entry: Entry, key: str) -> DataError:
    """An entry's problem as an error."""
    assert entry.problem is not None
    rule = _RULES[entry.problem]
    if "{key}" in rule:
        rule, cure = rule.format(key=key, told=entry.told), "name the field that holds the text with `--text-key`"
    else:
        rule, cure = f"{rule} ({entry.told})" if entry.told else rule, "correct or remove it"
    return DataError(f"{entry.where} {rule}: {cure}, or leave what is no document out with `--on-bad-line skip`.")


def ending(path: Path) -> str:
    """The last ending in small letters, without those of compression and of numbered parts; empty: there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and (suffixes[-1] in PACKED or re.fullmatch(r"\.\d+", suffixes[-1])):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def form_of(path: Path) -> Form:
    """In which form a file holds its entries: Parquet by its content, the rest by its ending, then by its content.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    return _form(path, _head(path))


def looks_readable(path: Path) -> bool:
    """Whether a file found in a folder is one of the forms: one without an ending may be any text.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    if ending(path) in (*LINES, *TEXT, ".parquet"):
        return True
    head = _head(path)
    return _form(path, head) != "text" or (not ending(path) and _is_text(head))


def _head(path: Path) -> bytes:
    with unpacked(path) as file:
        return file.read(_HEAD)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _form(path: Path, head: bytes) -> Form:
    name = ending(path)
    if head.startswith(PARQUET) or name == ".parquet":
        return "parquet"
    content = head.removeprefix(_BOM)
    if name in LINES:
        return "array" if content.lstrip().startswith(b"[") else "lines"
    if name in TEXT or not _JSON.match(content):
        return "text"
    if content.lstrip().startswith(b"["):
        return "array"
    first, cut, _ = content.lstrip().partition(b"\n")
    if not cut and len(head) == _HEAD:
        return "lines"
    try:
        return "lines" if isinstance(json.loads(first), dict) else "text"
    except ValueError:
        return "text"


def read_entries(path: Path, key: str, more: Sequence[str] = ()) -> Iterator[Entry]:
    """Read all entries of a file; blank lines are none.

    Args:
        path: The file.
        key: Field that holds the text.
        more: Other fields that are asked for; of Parquet no others are read.

    Raises:
        DataError: It cannot be read, or it is damaged so that what follows cannot be told.
        ConfigError: A library that it needs is not installed.
    """
    form = form_of(path)
    if form == "parquet":
        yield from _read_parquet(path, (key, *more))
        return
    with unpacked(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
            raise DataError(f"`{path}` must be UTF-8, but is UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`).")
        if form == "text":
            yield _read_text(path, file, key)
        else:
            yield from (_read_lines if form == "lines" else _read_array)(path, file)


def _read_text(path: Path, file: BinaryIO, key: str) -> Entry:
    content = file.read(LARGEST + 1)
    where = f"`{path}`"
    if len(content) > LARGEST:
        return Entry(where, {}, "too long")
    try:
        text = content.decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        return Entry(where, {}, "not UTF-8", f"byte {error.start}; `iconv -t UTF-8` converts")
    return Entry(where, {key: text}, marked=content.startswith(_BOM))


def _read_lines(path: Path, file: BinaryIO) -> Iterator[Entry]:
    number = 0
    while line := file.readline(LARGEST + 1):
        number += 1
        where = f"Line {number} of `{path}`"
        if len(line) > LARGEST:
            while line and not line.endswith(b"\n"):
                line = file.readline(LARGEST)
            yield Entry(where, {}, "too long")
            continue
        content = line.strip()
        marked = content.startswith(_BOM)
        content = content.removeprefix(_BOM)
        if not content:
            continue
        yield _parse(content, where)._replace(marked=marked)


def _parse(content: bytes, where: str) -> Entry:
    if not content.strip(b"\0"):
        return Entry(where, {}, "NUL characters", "nothing else: a write that was cut off")
    try:
        found: object = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Entry(where, {}, "not UTF-8", f"byte {error.start} of it")
    except RecursionError:
        return Entry(where, {}, "not JSON", "nested too deeply")
    except ValueError as error:
        return Entry(where, {}, "not JSON", str(error))
    return _object(found, where)


def _object(found: object, where: str) -> Entry:
    if isinstance(found, dict):
        return Entry(where, found)
    return Entry(where, {}, "no JSON object", type(found).__name__)


class _ArrayText:
    """The characters of a JSON array, no more of which are held than an entry and the next piece."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        # Bad bytes become characters that stand in no UTF-8, and are told with their entry.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._scan = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        piece = self._file.read(max(_HEAD, len(self._text) - self._at))  # doubles: a long entry is scanned few times
        self._text, self._at = self._text[self._at :] + self._decode(piece, final=not piece), 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while not (rest := self._text[self._at : self._at + _HEAD].lstrip(" \t\r\n")):
            self._at = min(self._at + _HEAD, len(self._text))
            if self._at == len(self._text) and not self._more():
                return ""
        self._at += len(self._text[self._at : self._at + _HEAD]) - len(rest)
        return rest[0]

    def take(self) -> str:
        """The same, and go behind it."""
        sign = self.peek()
        self._at += len(sign)
        return sign

    def value(self) -> tuple[object, str]:
        """The next value and how it is spelt; `ValueError` if there is none."""
        self.peek()
        while True:
            try:
                found, end = self._scan(self._text, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD
                if not cut or len(self._text) - self._at > LARGEST or not self._more():
                    raise ValueError(error.msg) from None
                continue
            if end < len(self._text) or not self._more():  # a number at the end of the piece may go on
                spelt, self._at = self._text[self._at : end], end
                return found, spelt


def _read_array(path: Path, file: BinaryIO) -> Iterator[Entry]:
    text = _ArrayText(file)
    text.take()
    number, sign = 0, text.peek()
    while sign != "]":
        number += 1
        where = f"Entry {number} of the array in `{path}`"
        try:
            found, spelt = text.value()
        except ValueError as error:
            raise DataError(f"{where} must be JSON, but is not ({error}): correct the file.") from error
        bad = re.search("[\udc80-\udcff]", spelt) is not None
        yield Entry(where, {}, "not UTF-8") if bad else _object(found, where)
        sign = text.take()
        if sign not in (",", "]"):
            raise DataError(f"{where} must be followed by `,` or `]`, but is not: correct the file.")
    if number == 0:
        text.take()
    if text.peek():
        raise DataError(f"The array in `{path}` must be all of the file, but more follows: correct the file.")


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    pa = pyarrow(path)
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise DataError(
                    f"`{path}` must have a column `{missing[0]}`, but has {names[:10]} instead: name the one that "
                    "holds the text with `--text-key`."
                )
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns)):
                for row in range(batch.num_rows):
                    number += 1
                    where = f"Row {number} of `{path}`"
                    try:
                        values = {name: batch.column(name)[row].as_py() for name in columns}
                    except UnicodeDecodeError:
                        yield Entry(where, {}, "not UTF-8")
                    else:
                        yield Entry(where, values)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"`{path}` cannot be read: {error.strerror}. Check its permissions.") from error
        raise DataError(f"`{path}` is broken Parquet ({error}): download or write it again.") from error
