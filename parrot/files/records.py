"""Records in data files -> conversations.

A *record* has a shape that its keys tell. It becomes a list of messages, or an error with file,
line and fault, whatever the bytes. Text that is not used is counted, never lost without a word.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from parrot.files import rows
from parrot.system.console import UserError

# What is read. A record holds turns; or a prompt and a reply, each a text or a list of turns, and
# perhaps context for the prompt. Both may have a system turn and earlier turns. Of several keys
# the first that holds something counts. To read another shape, add its keys here.
SHAPES = {
    "turns": ("messages", "conversations", "conversation"),
    "prompt": ("instruction", "prompt", "question", "query", "input"),
    "context": ("context", "input"),
    "reply": ("response", "output", "completion", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),  # pairs of a question and its answer
    "category": ("category",)}  # the kind of task (Dolly has eight)
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
EXPECTED = (f"a list of turns ({', '.join(SHAPES['turns'])}), or a prompt "
            f"({', '.join(SHAPES['prompt'])}) and a reply ({', '.join(SHAPES['reply'])})")
KEYS = {key for keys in SHAPES.values() for key in keys}
LONGEST = 1_000_000  # characters of a conversation; tokenising 50 million took 90 s and 11 GB


@dataclass
class Conversation:
    """messages: [{"role", "content", perhaps "context" and "weight"}]; source: for errors."""
    messages: list[dict]
    source: str
    number: int = 0  # of the line, or of the row in another kind of file
    category: str = ""
    unused: tuple = ()  # the keys of text that is not in the messages
    rejected: list | None = None  # of a pair: messages that end in another reply


class BadRecord(ValueError):
    """What is wrong with one record, in words."""


class UnknownShape(BadRecord):
    """A record of a kind that is not read at all; if it is the first, so are the others."""


def read_conversations(path, bad: list | None = None, start=0, stop=None,
                       pairs=False) -> Iterator[Conversation]:
    """Yield the conversations, or the pairs, in the rows `start` to `stop` of a file.

    A record that cannot be read is a UserError, or an entry in `bad`: (number, fault).
    """
    path, is_first = Path(path), start == 0
    source, count = source_of(path), None if stop is None else stop - start
    for number, row in islice(rows.read_rows(path, start, KEYS), count):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            yield _to_conversation(row, source, number, pairs)
        except (BadRecord, RecursionError) as error:
            if bad is None:
                hopeless = is_first and isinstance(error, UnknownShape)
                advice = "" if hopeless else " (--skip-bad-records leaves it out)"
                raise UserError(f"{source}{number}: {error}{advice}") from None
            bad.append((number, str(error)))
        is_first = False


def source_of(path: Path) -> str:
    """What precedes a record's number: "data.jsonl:" and lines, or "data.json: record "."""
    return f"{path}:" if rows.has_lines(path) else f"{path}: record "


def _to_conversation(row, source, number, pairs):
    record, unused = _parse(row) if isinstance(row, bytes) else row, set()
    messages, rejected = to_pair(record, unused) if pairs else (to_messages(record, unused), None)
    characters = sum(len(m["content"]) + len(m.get("context", ""))
                     for m in [*messages, *(rejected or ())])
    if characters > LONGEST:
        raise BadRecord(f"it has {characters:,} characters; more than {LONGEST:,} are refused")
    category = str(record.get("category") or "")[:80] if isinstance(record, dict) else ""
    return Conversation(messages, f"{source}{number}", number, category, tuple(sorted(unused)),
                        rejected)


def _parse(line):
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UnknownShape(f"not JSON: {error.msg} at character {error.pos + 1} (each line has to "
                        "hold one whole record)") from None
    except (ValueError, RecursionError) as error:
        raise UnknownShape(f"not JSON: {error}") from None


def to_messages(record, unused: set | None = None) -> list[dict]:
    """A record in any of the SHAPES -> messages; BadRecord says what is wrong with it.

    Keys with text that is not used are added to `unused`.
    >>> to_messages({"question": "Hi", "answer": "Ho"})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
    """
    rest = {"messages": record} if isinstance(record, list) else record
    if not isinstance(rest, dict) or None in rest:  # None: cells of CSV that have no name
        raise BadRecord(f"not a JSON object but {record!r:.40}")
    rest, unused = dict(rest), set() if unused is None else unused
    key, turns = _take(rest, "turns")
    messages = _turns(turns, key, unused) if key else _prompt_and_reply(rest, unused)
    key, history = _take(rest, "history")
    if key:
        pairs = history if isinstance(history, list) else [history]
        messages = [turn for pair in pairs for turn in _turns(pair, key, unused)] + messages
    if messages and messages[0]["role"] != "system":  # else it is told as unused
        key, system = _take(rest, "system")
        messages = [_message("system", system, key), *messages] if key else messages
    if not any(message["role"] == "assistant" and "weight" not in message for message in messages):
        raise BadRecord("it has no reply to learn from")
    _take(rest, "category")
    unused |= {str(key) for key, value in rest.items() if _has_text(value)}
    return messages


def to_pair(record, unused: set):
    """A record with chosen and rejected -> two lists of messages that differ in the last reply.

    Each is a reply to `prompt`, as text or as a list of turns; or all turns, the prompt among them.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= set(record):
        raise UnknownShape(f"{record!r:.80} has not the keys chosen and rejected (and prompt)")
    pair = []
    for key in ("chosen", "rejected"):
        rest = {name: value for name, value in record.items()
                if name in SHAPES["prompt"] + SHAPES["system"] + SHAPES["context"]}
        turns = _turns(record[key], key, unused) if isinstance(record[key], list) else None
        if turns and turns[0]["role"] != "assistant":
            messages = turns
        else:
            messages = to_messages({**rest, SHAPES["reply"][0]: record[key]}, unused)
        *earlier, last = messages
        if last["role"] != "assistant":
            raise BadRecord(f"{key} does not end with a reply")
        pair.append([{**turn, "weight": 0} if turn["role"] == "assistant" else turn
                     for turn in earlier] + [last])
    if pair[0][:-1] != pair[1][:-1]:
        raise BadRecord("chosen and rejected answer different prompts")
    if pair[0] == pair[1]:
        raise BadRecord("chosen and rejected are equal")
    used = {*rest, "chosen", "rejected", "messages", *SHAPES["category"]}
    unused |= {name for name in record if name not in used and _has_text(record[name])}
    return pair


def _take(rest, what):
    """Remove the first key of SHAPES[what] that holds something -> (key, value), or two None."""
    for key in SHAPES[what]:
        if rest.get(key) not in (None, [], {}) and str(rest[key]).strip():
            return key, rest.pop(key)
    return None, None


def _prompt_and_reply(rest, unused):
    keys = ", ".join(sorted(map(str, rest)))[:200] or "none"
    key, prompt = _take(rest, "prompt")
    context_key, context = _take(rest, "context")
    reply_key, reply = _take(rest, "reply")
    for what, found in (("prompt", key), ("reply", reply_key)):
        if not found:
            blank = next((name for name in SHAPES[what] if name in rest), None)
            if blank:
                raise BadRecord(f"{blank} is {rest[blank]!r:.40}, expected text")
            raise UnknownShape(f"its keys are {keys}; expected {EXPECTED}")
    if isinstance(prompt, list):
        asked = _turns(prompt, key, unused)
        for message in asked:
            if message["role"] == "assistant":
                message["weight"] = 0  # as in TRL: only the completion is learned
    else:
        asked = [_message("user", prompt, key)]
    if context_key:
        asked[-1]["context"] = _text(context, context_key)
    is_list = isinstance(reply, list)
    return asked + (_turns(reply, reply_key, unused) if is_list else
                    [_message("assistant", reply, reply_key)])


def _turns(turns, key, unused):
    """A list of turns: objects, or texts of user and assistant by turns -> messages."""
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [_message(("user", "assistant")[number % 2], turn, f"turn {number + 1} of {key}")
                for number, turn in enumerate(turns)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord(f"{key} is {turns!r:.40}, expected a list of turns")
    messages = [_turn(dict(turn), f"turn {number} of {key}", unused)
                for number, turn in enumerate(turns, 1)]
    return [message for message in messages if message]


def _turn(rest, where, unused):
    """{"role" or "from", "content" or "value", ...} -> a message; None: an empty system turn."""
    name, content = (rest.pop(key, rest.pop(other, None))
                     for key, other in (("role", "from"), ("content", "value")))
    role = ROLES.get(name.lower() if isinstance(name, str) else None)
    is_tool = name in ("tool", "function", "ipython")
    if is_tool or rest.get("tool_calls") or rest.get("function_call"):
        raise BadRecord(f"{where}: tool calls cannot be trained here")
    if not role:
        raise BadRecord(f"{where}: role is {name!r:.40}, expected one of {', '.join(ROLES)}")
    if role == "system" and not (content and str(content).strip()):
        return None
    message = _message(role, content, f"content of {where}")
    for key in ("weight", "train"):  # 0, false: it stays, but is not learned
        value = rest.pop(key, None)
        if value not in (None, 0, 1):
            raise BadRecord(f"{where}: {key} is {value!r:.40}, expected 0 or 1")
        if value is not None and not value and role == "assistant":
            message["weight"] = 0
    unused |= {f"{key} (of a turn)" for key, value in rest.items() if _has_text(value)}
    return message


def _message(role, content, where):
    if isinstance(content, list) and content:  # in parts
        for number, part in enumerate(content, 1):
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise BadRecord(f"{where}: part {number} is {kind!r:.40}, only text can be trained")
        content = "".join(_text(part.get("text"), where) for part in content)
    return {"role": role, "content": _text(content, where)}


def _text(text, where):
    """The text, if it is a string that is not blank and that UTF-8 can hold."""
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"{where} is {text!r:.40}, expected text")
    if re.search("[\ud800-\udfff]", text):
        raise BadRecord(f"{where} contains half of a surrogate pair")
    return text


def _has_text(value):
    """Whether there is text in a JSON value, however deep."""
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(map(_has_text, inner))
