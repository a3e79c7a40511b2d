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

# A record holds turns; or a prompt and a reply, each a text or a list of turns, and perhaps context
# for a prompt that is a text. Both may have a system turn and earlier turns. Of several keys the
# first that holds text counts. To read another shape, add its keys here.
SHAPES = {
    "turns": ("messages", "conversations", "conversation"),
    "prompt": ("instruction", "prompt", "question", "query", "input"),
    "context": ("context", "input"),
    "reply": ("response", "output", "completion", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),  # pairs of a question and its answer
    "category": ("category",),  # the kind of task (Dolly has eight)
    "pair": ("chosen", "rejected")}  # for parrot.dpo
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
KEYS = {key for keys in SHAPES.values() for key in keys}
LONGEST = 1_000_000  # characters of a conversation; tokenising 50 million took 90 s and 11 GB


@dataclass
class Conversation:
    """messages: [{"role", "content", perhaps "context" and "weight"}]; source: for errors."""
    messages: list[dict]
    source: str
    number: int = 0  # of the line, or of the row in another kind of file
    category: str = ""
    unused: frozenset = frozenset()  # the keys of text that is not in the messages


class BadRecord(ValueError):
    """What is wrong with one record, in words."""


def read_conversations(path, bad: list | None = None, start=0, stop=None,
                       pairs=False) -> Iterator[Conversation]:
    """Yield the conversations in the rows `start` to `stop` of a file; two for each of `pairs`.

    A record that cannot be read is a UserError, or an entry in `bad`: (number, fault).
    """
    path = Path(path)
    source, count = rows.source_of(path), None if stop is None else stop - start
    for number, row in islice(rows.read_rows(path, start, KEYS), count):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            yield from _to_conversations(row, source, number, pairs)
        except (BadRecord, RecursionError) as error:
            if bad is None:  # if not even the first can be read, skipping is no advice
                advice = " (--skip-bad-records leaves it out)" if number > 1 else ""
                raise UserError(f"{source}{number}: {error}{advice}") from None
            bad.append((number, str(error)))


def _to_conversations(row, source, number, pairs):
    try:
        record = json.loads(row.decode("utf-8")) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error} (each line has to hold one whole record)") from None
    unused = set()
    versions = to_pair(record, unused) if pairs else [to_messages(record, unused)]
    for messages in versions:
        length = sum(len(turn["content"]) + len(turn.get("context", "")) for turn in messages)
        if length > LONGEST:
            raise BadRecord(f"it has {length:,} characters; more than {LONGEST:,} are refused")
    category = str(record.get("category") or "")[:80] if isinstance(record, dict) else ""
    return [Conversation(messages, f"{source}{number}", number, category, frozenset(unused))
            for messages in versions]


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
        messages = _turns(history, key, unused) + messages
    if not any(message["role"] == "assistant" and "weight" not in message for message in messages):
        raise BadRecord("it has no reply to learn from")
    if messages[0]["role"] != "system":  # else it is told as unused
        key, system = _take(rest, "system")
        messages = [_message("system", system, key), *messages] if key else messages
    _take(rest, "category")
    unused |= {key for key, value in rest.items() if _has_text(value)}
    return messages


def to_pair(record, unused: set):
    """A record with chosen and rejected -> two lists of messages that differ in the last reply.

    Each is a reply to `prompt`, as text or turns; or all turns, the prompt among them.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= set(record):
        raise BadRecord(f"{record!r:.80} has not the keys chosen and rejected (and prompt)")
    others = record.keys() - {*SHAPES["pair"], *SHAPES["turns"]}  # some repeat chosen as messages
    rest, pair = {name: record[name] for name in others}, []
    for key in SHAPES["pair"]:
        turns = _turns(record[key], key, set(), "assistant")
        is_reply = [turn["role"] for turn in turns[:1]] == ["assistant"]
        shape = "response" if is_reply else "messages"
        *earlier, last = to_messages({**rest, shape: record[key]}, unused)
        if last["role"] != "assistant" or "weight" in last:
            raise BadRecord(f"{key} does not end with a reply to learn from")
        pair.append([*_only_read(earlier), last])
    if pair[0][:-1] != pair[1][:-1] or pair[0] == pair[1]:
        raise BadRecord("chosen and rejected are equal, or answer different prompts")
    unused -= set(SHAPES["prompt"])  # it is among the turns
    unused |= {"response"} if _has_text(record.get("response")) else set()
    return pair


def _take(rest, what):
    """Remove the first key of SHAPES[what] that holds text -> (key, value), or two None."""
    key = next((key for key in SHAPES[what] if _has_text(rest.get(key))), None)
    return key, rest.pop(key, None)


def _prompt_and_reply(rest, unused):
    keys = ", ".join(key for key in sorted(rest) if _has_text(rest[key]))[:200] or "none"
    key, prompt = _take(rest, "prompt")
    context_key, context = _take(rest, "context") if isinstance(prompt, str) else (None, None)
    reply_key, reply = _take(rest, "reply")
    if not key or not reply_key:
        known = (f"{what} ({', '.join(SHAPES[what])})" for what in ("turns", "prompt", "reply"))
        raise BadRecord("its keys with text are {}; expected {}, or {} and {}".format(keys, *known))
    asked = _only_read(_turns(prompt, key, unused, "user"))
    if context_key:
        asked[0]["context"] = _text(context, context_key)
    return asked + _turns(reply, reply_key, unused, "assistant")


def _only_read(messages):
    """The messages, so that no reply among them is learned: as in TRL, only the last one is."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message
            for message in messages]


def _turns(value, where, unused, role=None):
    """Turns, a turn, or a text of `role` -> messages. Texts in a list: user, assistant, user."""
    if isinstance(value, list):
        messages = []
        for number, turn in enumerate(value):
            place, role = f"turn {number + 1} of {where}", ("user", "assistant")[number % 2]
            messages += _turns(turn, place, unused, role)
        return messages
    if isinstance(value, dict):
        return _turn(dict(value), where, unused)
    if not role:
        raise BadRecord(f"{where} is {value!r:.40}, expected a list of turns")
    return [_message(role, value, where)]


def _turn(rest, where, unused):
    """{"role" or "from", "content" or "value", ...} -> [message]; [] of an empty system turn."""
    name = rest.pop("role", rest.pop("from", None))
    content = rest.pop("content", rest.pop("value", None))
    role = ROLES.get(str(name).lower())
    if name in ("tool", "function") or rest.get("tool_calls") or rest.get("function_call"):
        raise BadRecord(f"{where}: tool calls cannot be trained here")
    if not role:
        raise BadRecord(f"{where}: role is {name!r:.40}, expected one of {', '.join(ROLES)}")
    if role == "system" and not _has_text(content):
        return []
    message = _message(role, content, f"content of {where}")
    for key in ("weight", "train"):  # 0, false: it stays, but is not learned
        value = rest.pop(key, None)
        if value not in (None, 0, 1):
            raise BadRecord(f"{where}: {key} is {value!r:.40}, expected 0 or 1")
        if value == 0 and role == "assistant":
            message["weight"] = 0
    unused |= {f"{key} (of a turn)" for key, value in rest.items() if _has_text(value)}
    return [message]


def _message(role, content, where):
    if isinstance(content, list):  # in parts; one that is no text, as an image, is refused
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(_text(text, f"part {number} of the {where}")
                          for number, text in enumerate(texts, 1))
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
