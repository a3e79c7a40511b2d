"""Examples on disk: flat files that are mapped into memory, so that any number of them costs no memory.

    tokens.bin       the tokens of all examples, end to end
    supervised.bin   a byte for each: whether it is learned
    index.npy        (examples, 3): length, number of its record, whether it is held out
"""

from array import array

import numpy as np


def write(folder, examples, vocab_size):
    """Write an iterable of (tokens, supervised, record number, held out) into `folder`."""
    kind, index = np.min_scalar_type(vocab_size - 1), array("q")  # uint16 for 49,152 tokens
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "supervised.bin", "wb") as supervised_file:
        for tokens, supervised, number, held_out in examples:
            tokens_file.write(np.asarray(tokens, kind).tobytes())
            supervised_file.write(bytes(supervised))
            index.extend((len(tokens), number, held_out))
    np.save(folder / "index.npy", np.array(index, np.int64).reshape(-1, 3))


def read(folder, vocab_size):
    """-> tokens and supervised (all tokens,), both on disk still, and index (examples, 3)."""
    index = np.load(folder / "index.npy")
    if not len(index):  # nothing cannot be mapped
        return np.zeros(0, np.uint16), np.zeros(0, bool), index
    return (np.memmap(folder / "tokens.bin", np.min_scalar_type(vocab_size - 1), "r"),
            np.memmap(folder / "supervised.bin", bool, "r"), index)
