"""Make a conversation fit: the middle of its context goes first, the end of its reply last."""

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
        messages = _shorten_longest(messages, key, floor, tokenizer, max_length)
        tokens, supervised = encode_chat(messages, tokenizer)
        if len(tokens) <= max_length:
            return tokens, supervised, "context"
    cut = "reply" if any(supervised[max_length:]) else "context"
    return tokens[:max_length], supervised[:max_length], cut


def _shorten_longest(messages, key, floor, tokenizer, max_length):
    """Cut the middle out of the longest user text under `key`, no more than it takes."""
    candidates = [i for i, m in enumerate(messages)
                  if m["role"] == "user" and len(m.get(key, "")) > floor]
    if not candidates:
        return messages
    i = max(candidates, key=lambda i: len(messages[i][key]))

    def keeping(count):
        return [*messages[:i], {**messages[i], key: without_middle(messages[i][key], count)},
                *messages[i + 1:]]

    low, high = floor, min(len(messages[i][key]), 32 * max_length)  # characters to keep
    while low < high:  # the most that fits; tokens grow with characters
        middle = (low + high + 1) // 2
        fits = len(encode_chat(keeping(middle), tokenizer)[0]) <= max_length
        low, high = (middle, high) if fits else (low, middle - 1)
    return keeping(low)


def without_middle(text, count):
    """The first and the last of `text`, `count` characters in all.

    >>> without_middle("abcdefghij", 4), without_middle("abcdefghij", 0)
    ('ab … ij', '')
    """
    if count >= len(text) or count == 0:
        return text[:count]
    return text[:count - count // 2] + " … " + text[len(text) - count // 2:]
