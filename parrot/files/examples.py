"""Tokenised conversations in flat arrays: a few bytes per token, mapped from disk, no objects.

    tokens.bin    the tokens of all examples, end to end
    targets.bin   a byte for each token: whether it is a target
    index.npy     (examples, 3): length, number of its record, whether it is held out
"""

from array import array

import numpy as np


class Examples:
    """tokens, is_target (all tokens,); per example its start, length and record's number."""

    def __init__(self, tokens, is_target, starts, lengths, numbers, source=""):
        self.tokens, self.is_target = tokens, is_target
        self.starts, self.lengths, self.numbers = starts, lengths, numbers
        self._source = source  # what precedes a record's number: "data.jsonl:"

    @classmethod
    def of(cls, parts):
        """[(tokens, is_target)] -> Examples in memory."""
        lengths = np.array([len(tokens) for tokens, _ in parts])
        tokens = np.concatenate([np.asarray(tokens) for tokens, _ in parts])
        is_target = np.concatenate([np.asarray(flags, bool) for _, flags in parts])
        return cls(tokens, is_target, lengths.cumsum() - lengths, lengths, np.arange(len(parts)))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """(tokens, is_target) of one example, two arrays of one length."""
        span = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.tokens[span], self.is_target[span]

    def source(self, index):
        """Where an example came from: file and line."""
        return f"{self._source}{self.numbers[index]}"


def write(folder, examples, vocab_size):
    """Write an iterable of (tokens, is_target, record number, held out) into `folder`."""
    dtype, index = np.min_scalar_type(vocab_size - 1), array("q")  # uint16 for 49,152 tokens
    with open(folder / "tokens.bin", "wb") as ids, open(folder / "targets.bin", "wb") as flags:
        for tokens, is_target, number, held_out in examples:
            ids.write(np.asarray(tokens, dtype).tobytes())
            flags.write(bytes(is_target))
            index.extend((len(tokens), number, held_out))
    np.save(folder / "index.npy", np.array(index, np.int64).reshape(-1, 3))


def read(folder, vocab_size, source):
    """-> the Examples to train on, and those that are held out; their tokens are still on disk."""
    index = np.load(folder / "index.npy")
    tokens, is_target = np.zeros(0, np.uint16), np.zeros(0, bool)
    if len(index):  # an empty file cannot be mapped
        tokens = np.memmap(folder / "tokens.bin", np.min_scalar_type(vocab_size - 1), "r")
        is_target = np.memmap(folder / "targets.bin", bool, "r")
    lengths, numbers, held_out = index.T
    starts = lengths.cumsum() - lengths
    return [Examples(tokens, is_target, starts[side], lengths[side], numbers[side], source)
            for side in (held_out == 0, held_out == 1)]
