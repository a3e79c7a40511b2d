"""Data files -> rows: JSON lines, a JSON array, CSV or Parquet, with or without gzip.

A row is what a file holds of one record: the bytes of a line, or a dict. Nothing is interpreted.
"""

import codecs
import csv
import gzip
import io
import json
from contextlib import contextmanager
from itertools import islice

from parrot.system.console import UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")


@contextmanager
def naming(path):
    """What is wrong with a file as a whole becomes a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ImportError as error:  # Parquet
        raise UserError(f"{path}: to read it, pip install {error.name}") from None
    except Exception as error:  # whatever a damaged file leads a library to
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None


def format_of(path):
    """The format that a name tells, or None, which is read as JSON lines."""
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
        rows = _lines(path)
        if format_of(path) == ".csv":
            csv.field_size_limit(1 << 30)
            rows = csv.DictReader((line.decode() for line in rows), strict=True)
        elif _is_array(path):
            rows = json.loads(b"".join(rows))
        yield from islice(enumerate(rows, 1), start, None)


def count_rows(path):
    """How many rows a file has."""
    with naming(path):
        if format_of(path) == ".parquet":
            return _open_parquet(path).metadata.num_rows
        return sum(1 for _ in read_rows(path))


def source_of(path):
    """What precedes a row's number: "data.jsonl:" (editors jump there), or "data.csv: record "."""
    with naming(path):
        no_lines = format_of(path) in (".csv", ".parquet") or _is_array(path)
        return f"{path}: record " if no_lines else f"{path}:"


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
    """Whether a .json file is one array of records; otherwise it holds JSON lines."""
    if format_of(path) != ".json":
        return False
    return next((line for line in _lines(path) if line.strip()), b"").lstrip().startswith(b"[")


def _open_parquet(path):
    from pyarrow import parquet  # late: few need it
    return parquet.ParquetFile(path)


def _parquet_rows(path, start, columns):
    file = _open_parquet(path)
    names = [field.name for field in file.schema_arrow
             if field.name in columns or str(field.type).endswith("string")]
    for batch in file.iter_batches(1024, columns=names):  # row group by row group
        yield from batch.slice(start).to_pylist()
        start = max(0, start - batch.num_rows)
