"""Records in data files -> conversations.

The keys of a *record* show its shape. It becomes a list of messages, or an error with file, line
and fault, whatever the bytes. Text that is not used is counted and reported, never lost silently.
"""

import json
import re
from dataclasses import dataclass
from itertools import count, cycle, islice

from parrot.files import rows
from parrot.system.console import UserError, refuse

# A record holds turns; or a prompt, perhaps with context, and a reply, each a text or turns. Both
# may have a system turn and a history. The first key that holds text counts. Add yours here.
SHAPES = {
    "turns": ("messages", "conversations", "conversation"),
    "prompt": ("instruction", "prompt", "question", "query", "input"),
    "context": ("context", "input"),
    "reply": ("response", "output", "completion", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),  # pairs of a question and its answer
    "pair": ("chosen", "rejected")}  # for parrot.dpo
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
TEXTS = SHAPES["prompt"] + SHAPES["context"] + SHAPES["reply"]  # a number there is refused
KEYS = {key for keys in SHAPES.values() for key in keys}
MAX_CHARACTERS = 1_000_000  # of a conversation; tokenising 50 million took 90 s and 11 GB


@dataclass
class Conversation:
    messages: list[dict]  # {"role", "content"}, and "weight": 0 of a reply that is only read
    source: str  # for errors
    number: int = 0  # of the line, or of the row in another kind of file
    unused: frozenset = frozenset()  # the keys of text that is not in the messages


def read_conversations(path, bad: list | None = None, start=0, stop=None, pairs=False):
    """Yield the Conversations in the rows `start` to `stop` of a file; two for each of `pairs`.

    A record that cannot be read is a UserError, or an entry in `bad`: (number, fault).
    """
    source = rows.source_of(path)
    for number, row in islice(rows.read_rows(path, start, KEYS), stop and stop - start):
        if isinstance(row, bytes) and not row.strip():
            continue
        try:
            record, unused = row, set()
            if isinstance(row, bytes):
                record = json.loads(row.decode("utf-8"), object_pairs_hook=rows.to_dict)
            versions = to_pair(record, unused) if pairs else [to_messages(record, unused)]
        except (UserError, ValueError, RecursionError) as error:
            is_parsed = isinstance(error, UserError)
            fault = str(error) if is_parsed else f"not JSON: {error} (one record per line)"
            if bad is None:  # if not even the first can be read, skipping is no advice
                advice = " (--skip-bad-records leaves it out)" if number > 1 else ""
                raise UserError(f"{source}{number}: {fault}{advice}") from None
            bad.append((number, fault))
            continue
        for messages in versions:
            yield Conversation(messages, f"{source}{number}", number, frozenset(unused))


def to_messages(record, unused: set) -> list[dict]:
    """A record in any of the SHAPES -> messages; its keys whose text is not used join `unused`."""
    fields = {"messages": record} if isinstance(record, list) else record
    if not isinstance(fields, dict) or None in fields:  # None: cells of CSV that have no name
        raise UserError(f"not a JSON object but {record!r:.40}")
    rest = {key: value for key, value in fields.items()
            if _has_text(value) or (key in TEXTS and _is_nontext(value))}
    messages = _turns(*_take(rest, "turns"), unused) or _prompt_and_reply(rest, unused)
    messages = _turns(*_take(rest, "history"), unused) + messages
    if messages[0]["role"] != "system":  # else it is reported as unused
        system, key = _take(rest, "system")
        messages = _turns({"role": "system", "content": system}, key, unused) + messages
    rest.pop("category", None)  # the kind of task (Dolly has eight): not used, without a remark
    unused.update(rest)
    length = sum(len(message["content"]) for message in messages)
    refuse("it has", {
        "label false or weight 0, so it is not to be learned":
            fields.get("label") is False or fields.get("weight") == 0,
        "no reply to learn from": not any(map(is_learned, messages)),
        f"{length:,} characters, more than {MAX_CHARACTERS:,}": length > MAX_CHARACTERS})
    return messages


def to_pair(record, unused: set):
    """A record with chosen and rejected, each a reply to `prompt` or all turns -> two lists."""
    if not isinstance(record, dict) or not all(_has_text(record.get(k)) for k in SHAPES["pair"]):
        raise UserError(f"{record!r:.80} has no text under chosen and rejected (and prompt)")
    others = record.keys() - {*SHAPES["pair"], *SHAPES["turns"]}  # some repeat chosen as messages
    rest, pair = {name: record[name] for name in others}, []
    for key in SHAPES["pair"]:
        *earlier, last = to_messages({**rest, "response": record[key]}, unused)
        refuse(key, {"does not end with a reply to learn from": not is_learned(last)})
        pair.append([*_only_read(earlier), last])
    replies = {messages[-1]["content"].strip() for messages in pair}
    if pair[0][:-1] != pair[1][:-1] or len(replies) < 2:
        raise UserError("chosen and rejected are equal, or answer different prompts")
    shown = {message["content"].strip() for message in pair[0]}
    unused -= {key for key in SHAPES["prompt"] if str(rest.get(key)).strip() in shown}
    unused |= {"response"} if _has_text(rest.get("response")) else set()
    return pair


def _take(rest, what):
    """Remove the first key of SHAPES[what] that is there -> (value, key), or ([], None)."""
    key = next((key for key in SHAPES[what] if key in rest), None)
    return rest.pop(key, []), key


def _prompt_and_reply(rest, unused):
    keys = ", ".join(sorted(rest))[:200] or "none"
    reply = _turns(*_take(rest, "reply"), unused, "assistant")
    if reply and reply[0]["role"] != "assistant":  # all turns, the prompt among them
        return reply
    prompt, prompt_key = _take(rest, "prompt")
    if isinstance(prompt, str):
        context, key = _take(rest, "context")
        prompt = f"{prompt.strip()}\n\n{_text(context, key).strip()}" if key else prompt
    asked = _only_read(_turns(prompt, prompt_key, unused))
    if not asked or not reply:
        known = (f"{what} ({', '.join(SHAPES[what])})" for what in ("turns", "prompt", "reply"))
        raise UserError("its keys with text are {}; expected {}, or {} and {}".format(keys, *known))
    return asked + reply


def is_learned(message):  # a reply whose tokens are targets
    return message["role"] == "assistant" and "weight" not in message


def _only_read(messages):  # none of their replies is a target: as in TRL, only the last is
    return [{**message, "weight": 0} if message["role"] == "assistant" else message
            for message in messages]


def _turns(value, where, unused, role="user"):
    """Turns, a turn, or a text of `role` -> messages. Texts in a list: user, assistant, user."""
    if isinstance(value, str) and where in SHAPES["turns"] + SHAPES["history"]:
        raise UserError(f"{where} is {value!r:.40}, expected a list of turns")
    if isinstance(value, list):
        if where in TEXTS and any(isinstance(turn, str) for turn in value):
            raise UserError(f"{where} is a list of texts: join them, or give turns with roles")
        turns = zip(count(1), value, cycle(("user", "assistant")))
        return [message for number, turn, role in turns
                for message in _turns(turn, f"turn {number} of {where}", unused, role)]
    if not isinstance(value, dict):
        return [{"role": role, "content": _text(value, where)}]
    turn = dict(value)
    name = turn.pop("role", turn.pop("from", None))
    content = turn.pop("content", turn.pop("value", None))
    weights = [turn.pop(key, None) for key in ("weight", "train", "training", "loss")]
    role = ROLES.get(str(name).lower())
    refuse(f"{where}:", {
        "tool calls cannot be trained here":
            name in ("tool", "function") or turn.get("tool_calls") or turn.get("function_call"),
        f"role is {name!r:.40}, expected one of {', '.join(ROLES)}": not role,
        f"weight, train, training and loss are {weights!r:.40}, expected 0 or 1":
            any(weight not in (None, 0, 1) for weight in weights)})
    if role == "system" and not _has_text(content):
        return []
    unused |= {f"{key} (of a turn)" for key, value in turn.items() if _has_text(value)}
    if isinstance(content, list):  # in parts; one that is not text, such as an image, is refused
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(_text(text, f"part {number} of the content of {where}")
                          for number, text in enumerate(texts, 1))
    message = {"role": role, "content": _text(content, f"content of {where}")}
    return _only_read([message]) if 0 in weights else [message]


def _text(value, where):
    """The value, if it is a string that is not blank and that UTF-8 can hold."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {value!r:.40}, expected text")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where} contains half of a surrogate pair")
    return value


def _is_nontext(value):  # neither nothing, nor a text
    return not isinstance(value, str) and value not in (None, [], {}) and value == value  # no NaN


def _has_text(value):  # however deep it lies in a JSON value
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(map(_has_text, inner))
