"""Conversations -> examples -> ribbons.

A *conversation* (files/records.py) becomes an *example*: tokens, and for each whether it is a
target. A *ribbon* is a micro-batch: examples laid end to end, without padding, with the rows that
have a target. Every choice here is a pure function of the records and the seed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot import chat
from parrot.attention import Ribbon
from parrot.chat import encode_pieces, join, pieces_of, text_of
from parrot.files import cache, examples, records, tokenizer
from parrot.files.examples import Examples
from parrot.files.records import read_conversations, source_of
from parrot.files.tokenizer import Tokenizer
from parrot.system.console import UserError
from parrot.system.device import send
from parrot.system.disk import read_json, sha256_of, write_json

# Editing what makes the tokens must change them: the source is part of the cache's key.
CODE = cache.source_hash(__file__, chat, examples, records, tokenizer)


def is_held_out(messages, fraction):
    """Whether a conversation is kept from training: by the hash of its prompt alone.

    So the same prompt never stands on both sides, and neither the order of the file nor the seed
    changes the split. Case and white space do not count.
    """
    prompt = [" ".join(text_of(message).lower().split())
              for message in takewhile(lambda message: message["role"] != "assistant", messages)]
    digest = hashlib.sha256("\n".join(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# ---- conversations -> examples

def load_examples(path, tokenizer: Tokenizer, max_length, val_fraction, skip_bad=False):
    """A file -> (train Examples, held-out Examples, notes), from the cache if it is there.

    notes: {"told": lines for the user, "categories": {name: count}, "prompts": a few held out}.
    """
    path = Path(path)
    recipe = [path.suffix, sha256_of(path), sha256_of(tokenizer.folder / "tokenizer.json"),
              max_length, val_fraction, skip_bad, CODE]
    name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]

    def encode(folder):
        notes = {}
        encoded = encode_file(path, tokenizer, max_length, val_fraction, skip_bad, notes)
        examples.write(folder, encoded, tokenizer.vocab_size)
        write_json(folder / "notes.json", notes)
    folder = cache.kept(f"data/{name}", encode, at_most=8)
    notes = read_json(folder / "notes.json")
    train, held_out = examples.read(folder, tokenizer.vocab_size, source_of(path))
    if not len(train):
        reason = f" ({'; '.join(notes['told'])})" if notes["told"] else ""
        raise UserError(f"{path}: no example to train on{reason}; {len(held_out)} held out by "
                        f"--val-fraction {val_fraction}")
    return train, held_out, notes


def encode_file(path, tokenizer: Tokenizer, max_length, val_fraction, skip_bad, notes: dict):
    """Yield (tokens, is_target, record number, held out) of each conversation; fill `notes`."""
    bad, too_long, categories, prompts = [], 0, Counter(), []
    conversations = read_conversations(path, bad if skip_bad else None)
    with tqdm(desc="reading", unit=" records", leave=False) as bar:
        while chunk := list(islice(conversations, 4096)):
            encoded = encode_pieces([pieces_of(item.messages) for item in chunk], tokenizer)
            for conversation, pieces in zip(chunk, encoded, strict=True):
                tokens, is_target = join(pieces)
                if len(tokens) > max_length:
                    too_long += 1
                    continue
                categories[conversation.category or "none given"] += 1
                held_out = is_held_out(conversation.messages, val_fraction)
                if held_out and len(tokens) < 200 and len(conversation.messages) == 2:
                    prompts.append(conversation.messages[:1])
                yield tokens, is_target, conversation.number, held_out
            bar.update(len(chunk))
    told = [f"{too_long} left out: longer than --max-length {max_length}"] if too_long else []
    if bad:
        told.append(f"{len(bad)} bad, left out: {'; '.join(bad[:3])}")
    notes |= {"told": told, "categories": dict(categories.most_common(20)), "prompts": prompts[:3]}


# ---- examples -> ribbons

@dataclass
class Batch:
    """What one forward takes: a ribbon of N tokens, and the S rows that have a target.

    Row r predicts the token after it, so its target is token r + 1: the shift by one. Of the
    examples [5, 6, (7), (8)] and [9, (10), (11)], targets in brackets:

        position on the ribbon    0   1   2   3   4   5   6
        token                     5   6   7   8   9  10  11
        row -> its target             7   8      10  11

    >>> two = Examples.of([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 1])])
    >>> batch = Batch.of(two, [0, 1])
    >>> batch.rows.tolist(), batch.targets.tolist()
    ([1, 2, 4, 5], [7, 8, 10, 11])
    """
    tokens: torch.Tensor  # (N,)
    ribbon: Ribbon
    rows: torch.Tensor  # (S,)
    targets: torch.Tensor  # (S,)

    @classmethod
    def of(cls, examples: Examples, indices, device="cpu"):
        """The ribbon of some examples."""
        parts = [examples[index] for index in indices]
        tokens = np.concatenate([tokens for tokens, _ in parts]).astype(np.int64)
        # A document's first token is never a target, so a row and its target never lie in two.
        rows = np.flatnonzero(np.concatenate([is_target for _, is_target in parts])) - 1
        ribbon = Ribbon([len(tokens) for tokens, _ in parts], device)
        arrays = (tokens, rows, tokens[rows + 1])
        tokens, rows, targets = (send(torch.from_numpy(array), device) for array in arrays)
        return cls(tokens, ribbon, rows, targets)


def steps_per_epoch(examples: Examples, batch_size):
    """So many that no step has more than `batch_size` examples."""
    return math.ceil(len(examples) / batch_size)


def examples_of_step(step, examples: Examples, batch_size, seed):
    """The indices of step `step` (from 0): each example once an epoch, shuffled anew each time.

    A pure function, so a resumed run sees what the uninterrupted one would have. Steps differ by
    one example at most: a last step of three, say, would move the weights as far as one of 64.
    """
    steps = steps_per_epoch(examples, batch_size)
    epoch, step_of_epoch = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    return np.array_split(order, steps)[step_of_epoch]


def micro_batches(indices, lengths, max_examples, max_tokens):
    """Split indices, in order, into runs within both limits (None: no limit; at least one each).

    >>> micro_batches([0, 1, 2, 3], [5, 5, 5, 30], None, 12)
    [[0, 1], [2], [3]]
    """
    batches, tokens = [], 0
    for index in indices:
        tokens += lengths[index]
        full = not batches or len(batches[-1]) == max_examples
        if full or (max_tokens and tokens > max_tokens):
            batches.append([])
            tokens = lengths[index]
        batches[-1].append(index)
    return batches
