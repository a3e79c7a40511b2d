"""Tokenised conversations in flat arrays: a few bytes per token, mapped from disk, no objects.

On disk, tokens.bin has the tokens of a part, end to end, targets.bin a byte for each, whether it
is a target, and index.npy is the index below.
"""

from array import array

import numpy as np


class Examples:
    """Examples by number, whichever part of the data they lie in.

    parts: [(tokens, is_target, source)], flat arrays and what precedes a number: "data.jsonl:"
    index: (examples, 5): part, start, length, number of the record, hash of the prompt
    """

    def __init__(self, parts, index):
        self.parts, self.index = parts, index
        self.lengths, self.hashes = index[:, 2], index[:, 4]
        self.longest = int(self.lengths.max(initial=0))

    @classmethod
    def of(cls, pairs):
        """[(tokens, is_target)] -> Examples in memory."""
        tokens, is_target = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        lengths = np.array([len(tokens) for tokens, _ in pairs])
        columns = (0 * lengths, lengths.cumsum() - lengths, lengths, range(len(pairs)), 0 * lengths)
        return cls([(tokens, is_target.astype(bool), "")], np.column_stack(columns))

    @classmethod
    def joined(cls, several):
        parts, indices = [], [np.zeros((0, 5), np.int64)]
        for examples in several:
            indices.append(examples.index + [len(parts), 0, 0, 0, 0])
            parts += examples.parts
        return cls(parts, np.concatenate(indices))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """(tokens, is_target) of one example, two arrays of one length."""
        part, start, length = self.index[i, :3]
        tokens, is_target, _ = self.parts[part]
        return tokens[start:start + length], is_target[start:start + length]

    def source(self, i):
        return f"{self.parts[self.index[i, 0]][2]}{self.index[i, 3]}"

    def where(self, mask):
        """Those whose entry of `mask` (examples,) is True."""
        return Examples(self.parts, self.index[mask])


def write(folder, examples, vocab_size):
    """Write an iterable of (tokens, is_target, record number, hash of the prompt) into `folder`."""
    dtype = np.min_scalar_type(vocab_size - 1)  # uint16 for 49,152 tokens
    index, start = array("q"), 0
    with open(folder / "tokens.bin", "wb") as ids, open(folder / "targets.bin", "wb") as flags:
        for tokens, is_target, number, prompt_hash in examples:
            ids.write(np.asarray(tokens, dtype).tobytes())
            flags.write(bytes(is_target))
            index.extend((0, start, len(tokens), number, prompt_hash))
            start += len(tokens)
    np.save(folder / "index.npy", np.array(index, np.int64).reshape(-1, 5))


def read(folder, source, vocab_size):
    """What was written -> Examples; their tokens are still on disk."""
    index = np.load(folder / "index.npy")
    if not len(index):  # an empty file cannot be mapped
        return Examples([], index)
    tokens = np.memmap(folder / "tokens.bin", np.min_scalar_type(vocab_size - 1), "r")
    is_target = np.memmap(folder / "targets.bin", bool, "r")
    return Examples([(tokens, is_target, source)], index)
