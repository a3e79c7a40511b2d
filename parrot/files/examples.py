"""Tokenised conversations in flat arrays: a few bytes per token, mapped from disk, no objects."""

import numpy as np

FILES = "tokens.npy", "targets.npy", "index.npy"  # of a part: see Examples.__init__
NO_EXAMPLES = np.zeros((0, 5), np.int64)


class Examples:
    """Examples by number, whichever part of the data they lie in."""

    def __init__(self, parts=(), index=NO_EXAMPLES):
        self.parts = parts  # [(flat tokens, is_target, what precedes a number: "data.jsonl:")]
        self.index = index  # (examples, 5): part, start, length, number of record, hash of prompt
        self.lengths, self.hashes = index[:, 2], index[:, 4]
        self.longest = int(self.lengths.max(initial=0))

    @classmethod
    def of(cls, pairs, numbers=0, hashes=0):
        """[(tokens, is_target)], numbers of their records, hashes -> Examples in memory."""
        empty = np.zeros(0, np.uint16), np.zeros(0, bool)
        tokens, is_target = (np.concatenate(arrays) for arrays in zip(empty, *pairs, strict=True))
        index = np.zeros((len(pairs), 5), np.int64)
        index[:, 2] = [len(tokens) for tokens, _ in pairs]
        index[:, 1] = index[:, 2].cumsum() - index[:, 2]
        index[:, 3], index[:, 4] = numbers, hashes
        return cls([(tokens, is_target.astype(bool), "")], index)

    def save(self, folder):
        """Write a single part."""
        for name, array in zip(FILES, (*self.parts[0][:2], self.index), strict=True):
            np.save(folder / name, array)

    def with_part(self, folder, source):
        """These, then those that were saved in `folder`, whose tokens are still on disk."""
        tokens, is_target, index = (np.load(folder / name, mmap_mode="r") for name in FILES)
        index = np.concatenate([self.index, index + [len(self.parts), 0, 0, 0, 0]])
        return Examples([*self.parts, (tokens, is_target, source)], index)

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
