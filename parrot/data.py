"""Records -> conversations -> examples -> ribbons.

A *record* is what a file holds, in one of four shapes that its keys tell apart. It becomes a
*conversation* (messages), then an *example* (tokens and supervised flags), kept in flat
arrays. A *ribbon* is a micro-batch: examples laid end to end, no padding, with the rows
that are supervised. Every choice here is a pure function of the records and the seed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot.attention import Ribbon
from parrot.chat import ROLES, encode_pieces, fit, pieces_of, text_of
from parrot.console import UserError

SHAPES = ("instruction and response (Dolly; context may be added), messages, prompt and "
          "completion, or instruction and output (Alpaca; input may be added)")


@dataclass
class Conversation:
    """messages: [{"role", "content", perhaps "context"}]; source: file and line, for errors."""
    messages: list
    source: str


class BadRecord(ValueError):
    """What is wrong with one record, in words."""


# ---- records -> conversations

def read_conversations(path, bad=None):
    """Yield the conversations of a .jsonl, .json or .parquet file.

    A record that cannot be read raises UserError with file, line and fault; or, where `bad`
    is a list, the fault is appended to it and reading goes on.
    """
    path = Path(path)
    try:
        records = _parquet_records(path) if path.suffix == ".parquet" else _json_records(path)
        for source, parse in records:
            try:
                yield Conversation(to_messages(parse()), source)
            except (ValueError, RecursionError) as error:  # BadRecord, or the JSON parser's own
                fault = f"{source}: {_in_words(error)}"
                if bad is None:
                    raise UserError(f"{fault} (--skip-bad-records leaves such records out)") from None
                bad.append(fault)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _json_records(path):
    """Yield (source, function that parses the record): an array of objects, or one a line."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()  # some editors add this mark
        file.seek(0)
        if start.startswith(b"["):
            try:
                records = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: {_in_words(error)}") from None
            for number, record in enumerate(records, 1):
                yield f"{path}: record {number}", lambda record=record: record
            return
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", lambda line=line: json.loads(line.decode("utf-8"))


def _parquet_records(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet takes pyarrow: pip install pyarrow") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: record {number}", lambda record=record: record
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
        try:
            checked.append({"role": message["role"], "content": _words(message, "content")})
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from None
    if not any(m["role"] == "assistant" for m in checked):
        raise BadRecord("no message is the assistant's: there is nothing to learn")
    return checked


def _words(record, key):
    """The text under `key`: a string that is not blank and that UTF-8 can hold."""
    text = record.get(key)
    if not isinstance(text, str):
        raise BadRecord(f"{key} is not a string but {'missing' if text is None else type(text).__name__}")
    if not text.strip():
        raise BadRecord(f"{key} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{key} contains half of a surrogate pair") from None
    return text


def is_held_out(messages, fraction):
    """Whether a conversation is kept from training: by the hash of its prompt alone.

    So the same prompt never stands on both sides, and neither the order of the file nor the
    seed changes the split. Case and white space do not count.
    """
    prompt = []
    for message in messages:
        if message["role"] == "assistant":
            break
        prompt.append(" ".join(text_of(message).lower().split()))
    digest = hashlib.sha256("\n".join(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# ---- conversations -> examples

class Examples:
    """Tokenised conversations, end to end in flat arrays (few bytes a token, no objects)."""

    def __init__(self, parts, sources, vocab_size):
        """parts: [(tokens, supervised)]; sources: where each came from."""
        kind = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.lengths = np.array([len(tokens) for tokens, _ in parts], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        empty = [np.zeros(0)]
        self.tokens = np.concatenate([t for t, _ in parts] or empty).astype(kind)
        self.supervised = np.concatenate([s for _, s in parts] or empty).astype(bool)
        self.sources = sources

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """(tokens, supervised) of one example, two arrays of one length."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[span], self.supervised[span]


@dataclass
class Counts:
    """What happened to the records on their way, to be told before training begins."""
    context_cut: int = 0
    reply_cut: int = 0
    dropped: int = 0  # too long: nothing supervised was left
    bad: list = field(default_factory=list)

    def as_dict(self):
        """For run.json: only the first bad records, there may be many."""
        return {**asdict(self), "bad": len(self.bad), "first_bad": self.bad[:3]}

    def __str__(self):
        """One line for each thing that happened at all."""
        lines = [
            (self.context_cut, "too long: the middle of a context or of a long prompt was cut out"),
            (self.reply_cut, "too long: the end of a reply was cut off, and its stop token is not learned"),
            (self.dropped, "dropped: the prompt alone is too long"),
            (len(self.bad), "bad, left out: " + "; ".join(self.bad[:3]))]
        return "\n".join(f"{count} {what}" for count, what in lines if count)


def load_examples(path, tokenizer, max_length, val_fraction, skip_bad=False):
    """A file -> (train Examples, held-out Examples, Counts)."""
    counts = Counts()
    sides = ([], []), ([], [])  # (parts, sources) of train, of held out
    conversations = read_conversations(path, counts.bad if skip_bad else None)
    with tqdm(desc="reading", unit=" records", leave=False) as bar:
        while chunk := list(islice(conversations, 4096)):
            encoded = encode_pieces([pieces_of(each.messages) for each in chunk], tokenizer)
            for conversation, (tokens, supervised) in zip(chunk, encoded):
                if len(tokens) > max_length:
                    tokens, supervised, cut = fit(conversation.messages, tokenizer, max_length)
                    counts.context_cut += cut == "context" and any(supervised)
                    counts.reply_cut += cut == "reply" and any(supervised)
                if not any(supervised):
                    counts.dropped += 1
                    continue
                parts, sources = sides[is_held_out(conversation.messages, val_fraction)]
                parts.append((np.array(tokens, np.uint32), np.array(supervised, bool)))
                sources.append(conversation.source)
            bar.update(len(chunk))
    train, held_out = (Examples(*side, tokenizer.vocab_size) for side in sides)
    if not len(train):
        told = f" ({counts})" if str(counts) else ""
        raise UserError(f"{path}: no example to train on{told}; {len(held_out)} held out by "
                        f"--val-fraction {val_fraction}")
    return train, held_out, counts


# ---- examples -> ribbons

@dataclass
class Batch:
    """One forward's worth: a ribbon of N tokens, and the S rows that have a target."""
    tokens: torch.Tensor  # (N,)
    ribbon: Ribbon
    rows: torch.Tensor  # (S,) row r is supervised when token r + 1 is one to learn
    targets: torch.Tensor  # (S,) that token

    @classmethod
    def of(cls, examples, indices, device="cpu"):
        """The ribbon of some examples."""
        parts = [examples[index] for index in indices]
        tokens = torch.from_numpy(np.concatenate([t for t, _ in parts]).astype(np.int64)).to(device)
        supervised = np.concatenate([s for _, s in parts])
        # The first token of a document is a control token and never supervised, so row r and
        # its target r + 1 always lie in the same document.
        rows = torch.from_numpy(np.flatnonzero(supervised) - 1).to(device)
        return cls(tokens, Ribbon([len(t) for t, _ in parts], device), rows, tokens[rows + 1])


def steps_an_epoch(examples, batch_size):
    """The last step of an epoch may be smaller: every example is seen exactly once."""
    return -(-len(examples) // batch_size)


def examples_of_step(step, examples, batch_size, seed):
    """The indices of optimizer step `step` (from 0), shuffled anew each epoch.

    A pure function, so a resumed run sees exactly what the uninterrupted one would have.
    """
    epoch, place = divmod(step, steps_an_epoch(examples, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    return order[place * batch_size:(place + 1) * batch_size]


def micro_batches(indices, lengths, max_examples, max_tokens):
    """Split indices, in order, into runs within both limits (None: no limit; at least one each).

    >>> micro_batches([0, 1, 2, 3], [5, 5, 5, 30], None, 12)
    [[0, 1], [2], [3]]
    """
    batches, tokens = [], 0
    for index in indices:
        tokens += lengths[index]
        if not batches or len(batches[-1]) == max_examples or (max_tokens and tokens > max_tokens):
            batches.append([])
            tokens = lengths[index]
        batches[-1].append(index)
    return batches
