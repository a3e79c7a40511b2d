"""Records in files -> conversations.

A *record* is what a file holds, in a shape that its keys tell. It becomes a list of messages, or
an error with file, line and fault, whatever the bytes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parrot.system.console import UserError

ROLES = ("system", "user", "assistant")
SHAPES = (  # the keys of the prompt, of its context (None: there is none), of the reply
    ("instruction", "context", "response"),  # Dolly
    ("instruction", "input", "output"),  # Alpaca
    ("prompt", None, "completion"))
EXPECTED = ("instruction and response (Dolly; context may be added), messages, prompt and "
            "completion, or instruction and output (Alpaca; input may be added)")
LONGEST = 1_000_000  # characters of a conversation; tokenising 50 million took 90 s and 11 GB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before the first line


@dataclass
class Conversation:
    """messages: [{"role", "content", perhaps "context"}]; source: file and line, for errors."""
    messages: list[dict]
    source: str
    number: int = 0  # of the line, or of the record in an array
    category: str = ""  # the kind of task, where the record names it (Dolly has eight)


class BadRecord(ValueError):
    """What is wrong with one record, in words."""


def read_conversations(path, bad: list | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a .jsonl, .json or .parquet file.

    A record that cannot be read is a UserError, or an entry in the list `bad`: file, line, fault.
    """
    path = Path(path)
    try:
        source = source_of(path)
        for number, record in _records(path):
            try:
                yield _to_conversation(record, source, number)
            except (BadRecord, RecursionError) as error:
                fault = f"{source}{number}: {error}"
                if bad is None:
                    raise UserError(f"{fault} (--skip-bad-records leaves it out)") from None
                bad.append(fault)
    except BadRecord as error:  # the whole array is not JSON
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def source_of(path: Path) -> str:
    """What precedes a record's number: "data.jsonl:" and lines, or "data.json: record "."""
    return f"{path}: record " if path.suffix == ".parquet" or _is_array(path) else f"{path}:"


def _is_array(path):
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _records(path):
    """Yield (number, record): rows of a table, elements of an array, or lines as bytes."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
    elif _is_array(path):
        yield from enumerate(_parse(path.read_bytes()), 1)
    else:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    yield number, line


def _parquet_rows(path):
    try:
        from pyarrow import ArrowException, parquet
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except ImportError:
        raise UserError(f"{path}: reading Parquet takes pyarrow: pip install pyarrow") from None
    except ArrowException as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _parse(content):
    try:
        return json.loads(content.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None


def _to_conversation(record, source, number):
    record = _parse(record) if isinstance(record, bytes) else record
    messages = to_messages(record)
    characters = sum(len(m["content"]) + len(m.get("context", "")) for m in messages)
    if characters > LONGEST:
        raise BadRecord(f"it has {characters:,} characters; more than {LONGEST:,} are refused")
    category = str(record.get("category") or "")[:80]
    return Conversation(messages, f"{source}{number}", number, category)


def to_messages(record: dict) -> list[dict]:
    """A record in any of the shapes -> messages; BadRecord says what is wrong with it.

    >>> to_messages({"prompt": "Hi", "completion": "Ho"})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but a {type(record).__name__}")
    if "messages" in record:
        return _check_messages(record["messages"])
    for prompt, context, reply in SHAPES:
        if prompt in record and reply in record:
            user = {"role": "user", "content": _text(record, prompt)}
            if record.get(context):
                user["context"] = _text(record, context)
            return [user, {"role": "assistant", "content": _text(record, reply)}]
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise BadRecord(f"its keys are {keys[:200]}; expected {EXPECTED}")


def _check_messages(messages):
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecord("messages is not a list of objects")
    for number, message in enumerate(messages, 1):
        role, where = message.get("role"), f"message {number}: "
        if role not in ROLES:
            raise BadRecord(f"{where}role is {role!r:.40}, expected one of {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRecord(f"{where}a system turn can only be the first")
        _text(message, "content", where)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _text(record, key, where=""):
    """The text under `key`: a string that is not blank and that UTF-8 can hold."""
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"{where}{key} is {text!r:.40}, expected text")
    if re.search("[\ud800-\udfff]", text):
        raise BadRecord(f"{where}{key} contains half of a surrogate pair")
    return text
