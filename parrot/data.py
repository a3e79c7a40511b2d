"""Conversations -> examples -> ribbons.

A *conversation* (records.py) becomes an *example*: tokens and supervised flags, kept in flat
arrays. A *ribbon* is a micro-batch: examples laid end to end, no padding, with the rows that
are supervised. Every choice here is a pure function of the records and the seed.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot import hub, store
from parrot.attention import Ribbon
from parrot.chat import encode_pieces, pieces_of, text_of
from parrot.console import UserError
from parrot.device import send
from parrot.files import read_json, sha256_of, write_json
from parrot.records import read_conversations, source_of
from parrot.shorten import fit


def is_held_out(messages, fraction):
    """Whether a conversation is kept from training: by the hash of its prompt alone.

    So the same prompt never stands on both sides, and neither the order of the file nor the
    seed changes the split. Case and white space do not count.
    """
    prompt = [" ".join(text_of(message).lower().split())
              for message in takewhile(lambda message: message["role"] != "assistant", messages)]
    digest = hashlib.sha256("\n".join(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# ---- conversations -> examples

class Examples:
    """Tokenised conversations, end to end in flat arrays (few bytes a token, no objects)."""

    def __init__(self, tokens, supervised, starts, lengths, numbers, source=""):
        """tokens and supervised (all tokens,); of each example where it starts, its length, its record's number."""
        self.tokens, self.supervised = tokens, supervised
        self.starts, self.lengths, self.numbers = starts, lengths, numbers
        self._source = source  # what stands before the number: "data.jsonl:"

    @classmethod
    def of(cls, parts):
        """[(tokens, supervised)] -> Examples in memory."""
        lengths = np.array([len(tokens) for tokens, _ in parts])
        tokens, supervised = (np.concatenate([np.asarray(each) for each in side]) for side in zip(*parts))
        return cls(tokens, supervised, lengths.cumsum() - lengths, lengths, np.arange(len(parts)))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """(tokens, supervised) of one example, two arrays of one length."""
        span = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.tokens[span], self.supervised[span]

    def source(self, index):
        """Where an example came from: file and line."""
        return f"{self._source}{self.numbers[index]}"


@dataclass
class Counts:
    """What happened to the records on their way, to be told before training begins."""
    context_cut: int = 0
    reply_cut: int = 0
    dropped: int = 0  # too long: nothing supervised was left
    bad: int = 0
    first_bad: list = field(default_factory=list)
    categories: dict = field(default_factory=dict)  # of all examples, held out or not
    shown: list = field(default_factory=list)  # messages of a few held-out prompts, for the report

    def __str__(self):
        """One line for each thing that happened at all."""
        lines = [
            (self.context_cut, "too long: the middle of a context or of a long prompt was cut out"),
            (self.reply_cut, "too long: the end of a reply was cut off, and its stop token is not learned"),
            (self.dropped, "dropped: the prompt alone is too long"),
            (self.bad, "bad, left out: " + "; ".join(self.first_bad))]
        return "\n".join(f"{count} {what}" for count, what in lines if count)


def load_examples(path, tokenizer, max_length, val_fraction, skip_bad=False):
    """A file -> (train Examples, held-out Examples, Counts); from the cache where it was read before."""
    path = Path(path)
    recipe = [2, path.suffix, sha256_of(path), sha256_of(tokenizer.folder / "tokenizer.json"), max_length, val_fraction, skip_bad]
    name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]

    def encode(folder):
        counts = Counts()
        store.write(folder, encode_file(path, tokenizer, max_length, val_fraction, skip_bad, counts), tokenizer.vocab_size)
        write_json(folder / "counts.json", asdict(counts))
    folder = hub.kept(f"data/{name}", encode, at_most=8)

    counts = Counts(**read_json(folder / "counts.json"))
    tokens, supervised, index = store.read(folder, tokenizer.vocab_size)
    starts = index[:, 0].cumsum() - index[:, 0]

    def side(held_out):
        rows = index[:, 2] == held_out
        return Examples(tokens, supervised, starts[rows], index[rows, 0], index[rows, 1], source_of(path))
    train, held_out = side(False), side(True)
    if not len(train):
        told = f" ({counts})" if str(counts) else ""
        raise UserError(f"{path}: no example to train on{told}; {len(held_out)} held out by "
                        f"--val-fraction {val_fraction}")
    return train, held_out, counts


def encode_file(path, tokenizer, max_length, val_fraction, skip_bad, counts):
    """Yield (tokens, supervised, record number, held out) of every conversation, filling `counts`."""
    bad = [] if skip_bad else None
    conversations = read_conversations(path, bad)
    categories = Counter()
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
                categories[conversation.category or "none given"] += 1
                yield tokens, supervised, conversation.number, held_out
            bar.update(len(chunk))
    counts.categories = dict(categories.most_common(20))
    counts.bad, counts.first_bad = len(bad or ()), (bad or [])[:3]


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
        tokens = np.concatenate([t for t, _ in parts]).astype(np.int64)
        # The first token of a document is never supervised, as nothing stands before it. So row r
        # and its target r + 1 always lie in the same document.
        rows = np.flatnonzero(np.concatenate([s for _, s in parts])) - 1
        ribbon = Ribbon([len(t) for t, _ in parts], device)
        tokens, rows, targets = (send(torch.from_numpy(x), device) for x in (tokens, rows, tokens[rows + 1]))
        return cls(tokens, ribbon, rows, targets)


def steps_an_epoch(examples, batch_size):
    """So many that none has more than `batch_size` examples."""
    return -(-len(examples) // batch_size)


def examples_of_step(step, examples, batch_size, seed):
    """The indices of optimizer step `step` (from 0): each example once an epoch, shuffled anew each time.

    A pure function, so a resumed run sees exactly what the uninterrupted one would have. Steps differ
    by one example at most: a last one of what is left, three perhaps, would move the weights as far.
    """
    steps = steps_an_epoch(examples, batch_size)
    epoch, place = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    return np.array_split(order, steps)[place]


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
