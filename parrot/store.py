"""Examples on disk: flat files that are mapped into memory, so that their number costs none.

    tokens.bin       the tokens of all examples, end to end
    supervised.bin   a byte for each: whether it is learned
    index.npy        (examples, 3): length, number of its record, whether it is held out
"""

from array import array

import numpy as np

NUMBER = {True: np.uint16, False: np.uint32}  # by whether the vocabulary fits 16 bits


def write(folder, examples, vocab_size):
    """Write an iterable of (tokens, supervised, record number, held out) into `folder`."""
    kind, index = NUMBER[vocab_size <= 2**16], array("q")
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "supervised.bin", "wb") as supervised_file:
        for tokens, supervised, number, held_out in examples:
            tokens_file.write(np.asarray(tokens, kind).tobytes())
            supervised_file.write(bytes(supervised))
            index.extend((len(tokens), number, held_out))
    np.save(folder / "index.npy", np.array(index, np.int64).reshape(-1, 3))


def read(folder, vocab_size):
    """-> tokens (T,), supervised (T,), both on disk still, and index (examples, 3)."""
    index = np.load(folder / "index.npy")
    if not len(index):  # nothing cannot be mapped
        return np.zeros(0, np.uint16), np.zeros(0, bool), index
    return (np.memmap(folder / "tokens.bin", NUMBER[vocab_size <= 2**16], "r"),
            np.memmap(folder / "supervised.bin", bool, "r"), index)
