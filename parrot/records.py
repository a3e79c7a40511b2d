"""Records in files -> conversations.

A *record* is what a file holds, in one of four shapes that its keys tell apart; it becomes a
*conversation*, a list of messages. Whatever the bytes, the outcome is conversations or an
error that names file, line and fault.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from parrot.chat import ROLES
from parrot.console import UserError

LONGEST = 1_000_000  # characters: a conversation, not a library; tokenising 50 MB took 90 s and 11 GB

MARK = b"\xef\xbb\xbf"  # some editors put this byte order mark before the first line

SHAPES = ("instruction and response (Dolly; context may be added), messages, prompt and "
          "completion, or instruction and output (Alpaca; input may be added)")


@dataclass
class Conversation:
    """messages: [{"role", "content", perhaps "context"}]; source: file and line, for errors."""
    messages: list
    source: str
    number: int = 0  # of the line, or of the record in an array
    category: str = ""  # what kind of task it is, where the record says so (Dolly has eight)


class BadRecord(ValueError):
    """What is wrong with one record, in words."""


def read_conversations(path, bad=None):
    """Yield the conversations of a .jsonl, .json or .parquet file.

    A record that cannot be read raises UserError with file, line and fault; or, where `bad`
    is a list, the fault is appended to it and reading goes on.
    """
    path = Path(path)
    try:
        source = source_of(path)
        for number, record in _parquet_records(path) if path.suffix == ".parquet" else _json_records(path):
            try:
                if isinstance(record, bytes):  # a line, not parsed yet
                    record = json.loads(record.removeprefix(MARK).decode("utf-8"))
                messages = _of_sane_length(to_messages(record))
                yield Conversation(messages, f"{source}{number}", number, str(record.get("category") or "")[:80])
            except (ValueError, RecursionError) as error:  # BadRecord, or the JSON parser's own
                fault = f"{source}{number}: {_in_words(error)}"
                if bad is None:
                    raise UserError(f"{fault} (train.py and parrot.evaluate leave such records out with --skip-bad-records)") from None
                bad.append(fault)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def source_of(path):
    """What stands before a record's number: "data.jsonl:" and lines, or "data.json: record "."""
    return f"{path}: record " if path.suffix == ".parquet" or _is_array(path) else f"{path}:"


def _is_array(path):
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(MARK).lstrip().startswith(b"[")


def _json_records(path):
    """Yield (number, record) of an array, or (number, the bytes of a line)."""
    with open(path, "rb") as file:
        if _is_array(path):
            try:
                records = json.loads(file.read().removeprefix(MARK).decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: {_in_words(error)}") from None
            yield from enumerate(records, 1)
        else:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.removeprefix(MARK).strip())


def _parquet_records(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet takes pyarrow: pip install pyarrow") from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except ArrowException as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _in_words(error):
    if isinstance(error, BadRecord):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"


def to_messages(record):
    """A record in any of the four shapes -> messages; BadRecord says what is wrong with it.

    >>> to_messages({"prompt": "Hi", "completion": "Ho"})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but a {type(record).__name__}")
    if "messages" in record:
        return _check_messages(record["messages"])
    for prompt, context, reply in (("instruction", "context", "response"),
                                   ("instruction", "input", "output"), ("prompt", None, "completion")):
        if prompt in record and reply in record:
            user = {"role": "user", "content": _words(record, prompt)}
            if context and record.get(context):
                user["context"] = _words(record, context)
            return [user, {"role": "assistant", "content": _words(record, reply)}]
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise BadRecord(f"its keys are {keys[:200]}; expected {SHAPES}")


def _check_messages(messages):
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecord("messages is not a list of objects")
    checked = []
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES:
            raise BadRecord(f"message {number}: role is {message.get('role')!r:.40}, "
                            f"expected one of {', '.join(ROLES)}")
        if message["role"] == "system" and number > 1:
            raise BadRecord(f"message {number}: a system turn can only be the first")
        checked.append({"role": message["role"], "content": _words(message, "content", f"message {number}: content")})
    if not any(m["role"] == "assistant" for m in checked):
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    return checked


def _of_sane_length(messages):
    characters = sum(len(m["content"]) + len(m.get("context", "")) for m in messages)
    if characters > LONGEST:
        raise BadRecord(f"it has {characters:,} characters; more than {LONGEST:,} are no conversation")
    return messages


def _words(record, key, name=None):
    """The text under `key`: a string that is not blank and that UTF-8 can hold."""
    text, name = record.get(key), name or key
    if not isinstance(text, str):
        raise BadRecord(f"{name} is not a string but {'missing' if text is None else type(text).__name__}")
    if not text.strip():
        raise BadRecord(f"{name} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{name} contains half of a surrogate pair") from None
    return text
