"""Data files -> rows: JSON lines, a JSON array, CSV or Parquet, with or without gzip.

A row is what a file holds of one record: the bytes of a line, or a dict. Nothing is interpreted.
"""

import codecs
import csv
import gzip
import io
import json
from itertools import islice

from parrot.system.console import UserError
from parrot.system.disk import open_to_read

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
csv.field_size_limit(1 << 30)


def format_of(path):
    """One of FORMATS, by the name: a file of another name holds JSON lines."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), ".jsonl")


def read_rows(path, start=0, columns=()):
    """Yield (number, row), numbers from 1 on, after the first `start` rows. Raises UserError."""
    try:
        kind, rows = format_of(path), _lines(path)
        if kind == ".parquet":
            yield from enumerate(_parquet_rows(path, start, columns), start + 1)
            return
        if kind == ".csv":
            rows = csv.DictReader((line.decode() for line in rows), strict=True)
            to_dict([(name, None) for name in rows.fieldnames or () if name])
        elif kind == ".json":  # one array of records, or JSON lines
            first = next(filter(bytes.strip, _lines(path)), b"")
            if first.lstrip().startswith(b"["):
                rows = json.loads(b"".join(rows), object_pairs_hook=to_dict)
        yield from islice(enumerate(rows, 1), start, None)
    except (MemoryError, UserError):
        raise
    except ImportError as error:  # of a Parquet file
        raise UserError(f"{path}: to read it, pip install {error.name}") from None
    except Exception as error:  # whatever a damaged file leads a library to
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None


def to_dict(pairs):
    """[(key, value)] -> dict. Raises UserError for a key that stands there twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"the key {max(names, key=names.count)!r:.60} stands there twice")
    return dict(pairs)


def count_rows(path):
    return sum(1 for _ in read_rows(path, columns=None))


def source_of(path):
    """What precedes a row's number: "data.jsonl:" (editors jump there), or "data.csv: record "."""
    return f"{path}:" if format_of(path) == ".jsonl" else f"{path}: record "


def _lines(path):
    """The lines of a file as UTF-8. UTF-16 is known by the byte order mark that it begins with."""
    with open_to_read(path) as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            file = gzip.GzipFile(fileobj=file)
        mark = file.peek(3)[:3]
        if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            file = (line.encode() for line in io.TextIOWrapper(file, "utf-16", newline="\n"))
        elif mark == codecs.BOM_UTF8:
            file.read(3)
        yield from file


def _parquet_rows(path, start, columns):
    from pyarrow import parquet  # late: few need it
    file = parquet.ParquetFile(open_to_read(path))
    # Of the other columns nothing is used, and they may hold anything.
    names = [field.name for field in file.schema_arrow if columns is not None
             and (field.name in columns or "string" in str(field.type))
             and "timestamp[ns" not in str(field.type)]  # which needs pandas
    for batch in file.iter_batches(1024, columns=names):  # row group by row group
        yield from batch.slice(start).to_pylist()
        start = max(0, start - batch.num_rows)
