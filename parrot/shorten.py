"""Make a conversation fit: the middle of its context goes first, the end of its reply last."""

import bisect

from parrot.chat import encode_chat

SHORTEST_PROMPT = 200  # characters of a user's turn that are never cut away


def fit(messages, tokenizer, max_length):
    """A conversation of any length -> at most `max_length` tokens.

    Returns (tokens, supervised, cut), cut being "" (it was short enough), "context" (the
    middle of a context or of a long user turn is gone) or "reply" (the end of a reply is
    gone, and with it its <|im_end|>: the model must not learn to stop there).
    """
    tokens, supervised = encode_chat(messages, tokenizer)
    if len(tokens) <= max_length:
        return tokens, supervised, ""
    for key, floor in (("context", 0), ("content", SHORTEST_PROMPT)):
        messages = _shorten(messages, key, floor, tokenizer, max_length)
        tokens, supervised = encode_chat(messages, tokenizer)
        if len(tokens) <= max_length:
            return tokens, supervised, "context"
    cut = "reply" if any(supervised[max_length:]) else "context"
    return tokens[:max_length], supervised[:max_length], cut


def _shorten(messages, key, floor, tokenizer, max_length):
    """Cut the middle out of the user's longest texts under `key`, no more than it takes."""
    def keeping(count):
        return [{**m, key: without_middle(m[key], count)} if m["role"] == "user" and m.get(key) else m
                for m in messages]

    longest = max((len(m.get(key, "")) for m in messages if m["role"] == "user"), default=0)
    counts = range(floor, max(floor, min(longest, 32 * max_length)) + 1)  # characters to keep of each
    fitting = bisect.bisect_right(counts, max_length, key=lambda count: len(encode_chat(keeping(count), tokenizer)[0]))
    return keeping(counts[max(fitting - 1, 0)])


def without_middle(text, count):
    """The first and the last of `text`, `count` characters in all.

    >>> without_middle("abcdefghij", 4), without_middle("abcdefghij", 0)
    ('ab … ij', '')
    """
    if count >= len(text) or count == 0:
        return text[:count]
    return text[:count - count // 2] + " … " + text[len(text) - count // 2:]
