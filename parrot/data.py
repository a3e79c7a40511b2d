"""Conversations -> examples -> ribbons.

A *conversation* (records.py) becomes an *example*: tokens and supervised flags, kept in flat
arrays. A *ribbon* is a micro-batch: examples laid end to end, no padding, with the rows that
are supervised. Every choice here is a pure function of the records and the seed.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from parrot.attention import Ribbon
from parrot.chat import encode_pieces, pieces_of, text_of
from parrot.console import UserError
from parrot.records import read_conversations
from parrot.shorten import fit


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
    categories: Counter = field(default_factory=Counter)  # of all examples, held out or not
    shown: list = field(default_factory=list)  # messages of a few held-out prompts, for the report

    def as_dict(self):
        """For run.json: only the first bad records, there may be many."""
        return {"context_cut": self.context_cut, "reply_cut": self.reply_cut, "dropped": self.dropped,
                "bad": len(self.bad), "first_bad": self.bad[:3], "categories": dict(self.categories)}

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
                held_out = is_held_out(conversation.messages, val_fraction)
                if held_out and len(counts.shown) < 3 and len(tokens) < 200 and len(conversation.messages) == 2:
                    counts.shown.append(conversation.messages[:1])
                counts.categories[conversation.category or "none given"] += 1
                parts, sources = sides[held_out]
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
