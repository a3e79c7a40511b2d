"""Data files -> rows: JSON lines, a JSON array, CSV or Parquet, with or without gzip.

A row is what a file holds of one record: the bytes of a line, or a dict. Nothing is interpreted.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from itertools import islice

from parrot.system.console import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")


@contextmanager
def naming(path):
    """What is wrong with a file as a whole becomes a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None


def format_of(path):
    """The format that a name tells, or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_rows(path, start=0, columns=()):
    """Yield (number, row), numbers from 1 on, after the first `start` rows. UserError.

    Of a Parquet file only text and the named columns are read: the others may hold anything.
    """
    with naming(path):
        if format_of(path) == ".parquet":
            yield from enumerate(_parquet_rows(path, start, columns), start + 1)
            return
        if format_of(path) == ".csv":
            csv.field_size_limit(1 << 30)
            rows = csv.DictReader((line.decode() for line in _lines(path)), strict=True)
        elif _is_array(path):
            rows = json.loads(b"".join(_lines(path)))
        else:
            rows = _lines(path)
        yield from islice(enumerate(rows, 1), start, None)


def count_rows(path):
    """How many rows there are, for a progress bar."""
    if format_of(path) == ".parquet":
        return _open_parquet(path).metadata.num_rows
    return sum(1 for _ in read_rows(path))


def has_lines(path):
    """Whether a row's number is that of a line: editors jump there."""
    with naming(path):
        return format_of(path) not in (".csv", ".parquet") and not _is_array(path)


def _lines(path):
    """The lines of a file as UTF-8. UTF-16 is known by the byte order mark that it begins with."""
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            file = gzip.GzipFile(fileobj=file)
        mark = file.peek(3)[:3]
        if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            file = (line.encode() for line in io.TextIOWrapper(file, "utf-16", newline="\n"))
        elif mark == codecs.BOM_UTF8:
            file.read(3)
        yield from file


def _is_array(path):
    """Whether a file is one JSON array of records; a line may be an array of messages, too."""
    first = next((line for line in _lines(path) if line.strip()), b"").lstrip()
    if not first.startswith(b"["):
        return False
    try:
        turns = json.loads(first)
    except (ValueError, RecursionError):
        return True  # it goes on in the next line
    return not (turns and all(map(_is_turn, turns)))


def _is_turn(entry):
    return isinstance(entry, str) or isinstance(entry, dict) and bool({"role", "from"} & set(entry))


def _open_parquet(path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet takes pyarrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # whatever a damaged file leads the library to
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _parquet_rows(path, start, columns):
    file = _open_parquet(path)
    names = [field.name for field in file.schema_arrow
             if field.name in columns or str(field.type).endswith("string")]
    try:
        for batch in file.iter_batches(1024, columns=names):  # row group by row group
            yield from batch.slice(start).to_pylist()
            start = max(0, start - batch.num_rows)
    except Exception as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from None
