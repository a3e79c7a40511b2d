r"""A conversation -> tokens, and which of them the model is trained to say.

    messages                                  tokens                       supervised
    {"role": "user", "content": "Hi"}         <|im_start|>user\nHi<|im_end|>\n      no
    {"role": "assistant", "content": "Ho"}    <|im_start|>assistant\n               no
                                              Ho<|im_end|>                          YES
                                              \n                                    no

The flags are built with the tokens, by the code that writes the reply, so the end of the
reply is always learned and nothing is ever masked for being equal to some padding token.
See it on your own data: `python -m parrot.chat FILE`.
"""

import re
import sys
from itertools import groupby, islice

from parrot.console import UserError, printable, run_program, say

ROLES = ("system", "user", "assistant")

# What a trained folder carries, so that other software builds exactly our tokens. No system
# turn is added, and the text is trimmed: white space before a reply would merge with the "\n".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class Control(str):
    """A control token's name, which only this file can put among the tokens."""


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")


def text_of(message):
    """The words of a turn: its content, then its context (what a task is about), if any."""
    content, context = message["content"].strip(), message.get("context", "").strip()
    return f"{content}\n\n{context}" if context else content


def pieces_of(messages):
    """Messages -> [(text or Control, supervised)], the template itself.

    >>> pieces_of([{"role": "assistant", "content": "Ho"}])[2:4]
    [('Ho', True), ('<|im_end|>', True)]
    """
    pieces = []
    for message in messages:
        learned = message["role"] == "assistant"
        if learned:
            words = [("assistant\n", False), (text_of(message), True)]
        else:
            words = [(f"{message['role']}\n{text_of(message)}", False)]
        pieces += [(IM_START, False), *words, (IM_END, learned), ("\n", False)]
    return pieces


def encode_pieces(conversations, tokenizer):
    """Several lists of pieces -> [(tokens, supervised)], all texts encoded in one batch."""
    texts = {text for pieces in conversations for text, _ in pieces if not isinstance(text, Control)}
    ids = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    ids_of_control = {name: [tokenizer.control(name)] for name in (IM_START, IM_END)}
    encoded = []
    for pieces in conversations:
        tokens, supervised = [], []
        for text, learned in pieces:
            new = ids_of_control[text] if isinstance(text, Control) else ids[text]
            tokens += new
            supervised += [learned] * len(new)
        encoded.append((tokens, supervised))
    return encoded


def encode_chat(messages, tokenizer):
    """Messages -> (tokens, supervised), two lists of one length."""
    return encode_pieces([pieces_of(messages)], tokenizer)[0]


def with_system(messages, system):
    """The messages, begun with the turn `system`, if any, where they have no system turn of their own."""
    return [{"role": "system", "content": system}, *messages] if system and messages[0]["role"] != "system" else messages


def encode_prompt(messages, tokenizer, system=None):
    """Messages, after `with_system` -> the tokens after which the model writes the assistant's reply."""
    pieces = [*pieces_of(with_system(messages, system)), (IM_START, False), ("assistant\n", False)]
    return encode_pieces([pieces], tokenizer)[0][0]


def default_system(template):
    r"""The system turn that a ChatML template puts in where there is none, or None.

    Read from the template's text, because running a downloaded template is running a program.
    >>> default_system("{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}")
    'You are kind.'
    """
    if IM_START not in template or IM_END not in template:
        raise UserError("the model's chat template is not ChatML (<|im_start|> ... <|im_end|>): "
                        "take another, or let sample.py --format plain go on with a text")
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}]+)<\|im_end\|>", template)
    return found.group(1) if found else None


def pieces_of_view(tokens, supervised, tokenizer):
    """Tokens as text, control tokens by name -> [[text, whether it is supervised]]."""
    return [[tokenizer.decode_with_control([token for token, _ in run]), bool(learned)]
            for learned, run in groupby(zip(tokens, supervised), key=lambda pair: pair[1])]


def coloured(tokens, supervised, tokenizer, colour=True):
    """Tokens as text for the terminal: what is supervised in green (without colours: in «»)."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    return "".join(before + printable(text) + after if learned else printable(text)
                   for text, learned in pieces_of_view(tokens, supervised, tokenizer))


def main():
    """python -m parrot.chat FILE [MODEL]: the first five records of FILE, supervised tokens marked."""
    from parrot import hub, records  # they build on this module; only this view needs them
    from parrot.tokenizer import Tokenizer
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        say(f"usage: {main.__doc__.split(':')[0]}   (MODEL: whose tokenizer, default instruct-q4)")
        sys.exit(2)
    tokenizer = Tokenizer(hub.find_weights((sys.argv[2:] or ["instruct-q4"])[0]).path)
    conversations = records.read_conversations(hub.find_data(sys.argv[1]).path)
    for conversation in islice(conversations, 5):
        tokens, supervised = encode_chat(conversation.messages, tokenizer)
        say(f"--- {conversation.source}: {len(tokens)} tokens, {sum(supervised)} supervised")
        print(coloured(tokens, supervised, tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    run_program(main)
