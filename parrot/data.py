"""Conversations -> examples -> ribbons.

A *conversation* (files/records.py) becomes an *example*: tokens, and for each whether it is a
target. A *ribbon* is examples laid end to end, without padding.
"""

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile

import numpy as np
import torch
from tqdm import tqdm

from parrot import chat
from parrot.attention import Ribbon
from parrot.files import cache, examples, hub, records, rows, tokenizer
from parrot.files.examples import Examples
from parrot.files.tokenizer import CONTROL, Tokenizer
from parrot.system.console import UserError, printable
from parrot.system.disk import read_json, sha256_of, write_json

# If this code changes, cached tokens are stale: its hash is part of the cache's key.
CODE = cache.source_hash(__file__, chat, examples, records, rows, tokenizer)
PART = 20_000  # records tokenised and saved at a time: an interruption loses at most one part


# ---- examples -> ribbons

@dataclass
class Batch:
    """A micro-batch, for one forward: a ribbon of N tokens, and the S rows that have a target.

    Row r predicts the token after it, so its target is token r + 1: the shift by one.

    >>> two = Examples.of([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 1])])
    >>> batch = Batch.of(two, [0, 1])
    >>> batch.rows.tolist(), batch.targets.tolist()
    ([1, 2, 4, 5], [7, 8, 10, 11])
    """
    tokens: torch.Tensor  # (N,)
    ribbon: Ribbon
    rows: torch.Tensor  # (S,)
    targets: torch.Tensor  # (S,)
    num_terms: int  # of the loss: S, one per target

    @classmethod
    def of(cls, examples: Examples, indices, device="cpu"):  # these examples, end to end
        parts = [examples[index] for index in indices]
        tokens, is_target = map(np.concatenate, zip(*parts, strict=True))
        tokens = tokens.astype(np.int64)
        # A document's first token is never a target: row and target lie in the same document.
        rows = np.flatnonzero(is_target) - 1
        ribbon = Ribbon([len(part) for part, _ in parts], device)
        arrays = (tokens, rows, tokens[rows + 1])
        tokens, rows, targets = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(tokens, ribbon, rows, targets, len(targets))


def steps_per_epoch(examples: Examples, batch_size):
    return math.ceil(len(examples) / batch_size)


def examples_of_step(step, examples: Examples, batch_size, seed):
    """The indices of step `step` (from 0): each example once an epoch, shuffled anew each time.

    The sizes of steps differ by 1 at most: a last step of 3 would move the weights as far as 64.
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
        if not batches or len(batches[-1]) == max_examples or (max_tokens and tokens > max_tokens):
            batches.append([])
            tokens = lengths[index]
        batches[-1].append(index)
    return batches


# ---- conversations -> examples: the split, and the cache (skip at first)

def prompt_hash(messages):
    """A 63-bit hash of all that precedes the first reply, whatever its case and white space."""
    prompt = [" ".join(message["content"].lower().split())
              for message in takewhile(lambda message: message["role"] != "assistant", messages)]
    return int.from_bytes(hashlib.sha256("\n".join(prompt).encode()).digest()[:8], "big") >> 1


def is_held_out(hashes, fraction):
    """Whether examples are held out: decided by prompt, so no prompt is in both sets."""
    return hashes < fraction * 2.0**63


def load_examples(data: hub.Found, tokenizer: Tokenizer, max_length, val_fraction, *,
                  skip_bad=False, max_examples=None, val_data=None, pairs=False):
    """Data files -> (train Examples, held-out Examples, remarks for the user). Raises UserError.

    Held out are all of `val_data` or, without it, the share that `is_held_out` picks.
    """
    train, remarks = tokenised(data, tokenizer, max_length, skip_bad, pairs, max_examples)
    if val_data:
        held_out, more = tokenised(val_data, tokenizer, max_length, skip_bad, pairs)
        remarks += more
        if both := np.isin(held_out.hashes, train.hashes).sum():
            remarks.append(f"{both} held-out examples have a prompt that is trained on")
    else:
        is_val = is_held_out(train.hashes, val_fraction)
        if len(is_val) and (is_val.all() or is_val.mean() < val_fraction / 2):
            remarks.append(
                f"{is_val.sum()} of {len(is_val)} examples are held out (--val-fraction asks for "
                f"{len(is_val) * val_fraction:.1f}): there are {len(set(train.hashes))} different "
                "prompts. Choose another --val-fraction (0: none), or --val-data")
        train, held_out = train.where(~is_val), train.where(is_val)
    if not len(train):
        reasons = "; ".join(remarks) or "no record"
        raise UserError(f"{data.origin['name']}: no example to train on ({reasons})")
    return train, held_out, remarks


def tokenised(data: hub.Found, tokenizer, max_length, skip_bad, pairs=False, max_examples=None,
              system=None):
    """Data files -> (Examples of at most `max_length` tokens, remarks); each PART is cached.

    system: of a conversation that has none. pairs: two examples each, the chosen one first.
    """
    versions = 2 if pairs else 1  # of a conversation
    most = (max_examples or math.inf) * versions
    recipe = [skip_bad, pairs, system]
    key = [hashlib.sha256(tokenizer.content).hexdigest(), PART, CODE, *recipe]
    joined, places = Examples(), defaultdict(list)
    totals = {path: rows.count_rows(path) for path in data.files}
    for path, start in [(file, start) for file in totals for start in range(0, totals[file], PART)]:
        sha256, source = data.hashes[path], rows.source_of(path)
        name = cache.key_of(rows.format_of(path), sha256, start, *key)
        make = partial(write_part, path, sha256, start, totals[path], tokenizer, *recipe)
        folder = cache.kept(f"data/{name}", make)
        joined = joined.with_part(folder, source)
        for remark, where in read_json(folder / "notes.json").items():
            places[remark] += [f"{source}{place}" for place in where]
        if len(joined) >= most:
            break
    remarks = [f"{len(where)} {remark} ({', '.join(where[:3])}{' ...' * (len(where) > 3)})"
               for remark, where in places.items()]
    joined = joined.where(np.arange(len(joined)) < most)
    longest = joined.lengths.reshape(-1, versions).max(axis=1).repeat(versions)  # of a pair
    if too_long := int((longest > max_length).sum()) // versions:
        remarks.append(f"{too_long} examples left out: longer than {max_length} tokens")
    return joined.where(longest <= max_length), remarks


def write_part(path, sha256, start, total, tokenizer: Tokenizer, skip_bad, pairs, system, folder):
    """Tokenise the PART records from `start` on into `folder`; notes.json has {remark: places}."""
    bad, notes = [], defaultdict(dict)  # {remark: {number: True}}: a pair counts once
    items = records.read_conversations(path, bad if skip_bad else None, start, start + PART, pairs)
    items = iter(tqdm(items, printable(f"tokenising {path.name}"), leave=False, initial=start,
                      total=total))
    examples, numbers, hashes = [], [], []
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # uint16 for 49,152 tokens
    while chunk := list(islice(items, 2048)):  # encoded on all cores
        pieces = [chat.pieces_of(chat.with_system(item.messages, system)) for item in chunk]
        for item, (tokens, flags) in zip(chunk, chat.encode_pieces(pieces, tokenizer), strict=True):
            examples.append((np.array(tokens, dtype), np.array(flags)))
            numbers.append(item.number)
            hashes.append(prompt_hash(item.messages))
            for remark in remarks_on(item):
                notes[remark][item.number] = True
    Examples.of(examples, numbers, hashes).save(folder)
    if bad:
        notes["bad records are left out"] = [f"{number}: {fault}" for number, fault in bad]
    write_json(folder / "notes.json", {remark: list(where) for remark, where in notes.items()})
    if sha256_of(path) != sha256:
        raise UserError(f"{path} changed while it was read: start again")


def remarks_on(conversation: records.Conversation):
    """Yield a remark for each way in which a conversation is not learned as it stands."""
    for key in sorted(conversation.unused):
        yield f"records have text under {key!a:.60}, which is not used"
    for message in conversation.messages:
        if "weight" in message:
            yield "records have replies that are not learned, only read (weight 0, or in a prompt)"
        if message["role"] == "assistant" and re.match(r"(\s*\n)?(  |\t)", message["content"]):
            yield "records have a reply whose first line loses its indentation"
        if any(name in message["content"] for name in CONTROL):
            yield "records spell a control token, which is read as ordinary text"
