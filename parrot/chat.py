r"""A conversation -> tokens, and the mask: which of them are targets, what the model learns to say.

    messages                                  tokens                               targets
    {"role": "user", "content": "Hi"}         <|im_start|>user\nHi<|im_end|>\n     none
    {"role": "assistant", "content": "Ho"}    <|im_start|>assistant\n              none
                                              Ho<|im_end|>                         all
                                              \n                                   none

A reply's end is always a target, so the model learns to stop. See it: python -m parrot.chat FILE
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice

from jinja2.sandbox import ImmutableSandboxedEnvironment

from parrot.files import hub, records
from parrot.files.tokenizer import IM_END, IM_START, Tokenizer
from parrot.system.command_line import option, parse
from parrot.system.console import UserError, printable, run_program, say

# For a trained folder, so that other software builds exactly our tokens. Texts are trimmed: white
# space before a reply would merge with the "\n".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


class Control(str):
    """The name of a control token; a plain str is ordinary text. Only this file makes them."""


IM_START, IM_END = Control(IM_START), Control(IM_END)


def pieces_of(messages):
    """Messages -> [(text or Control, whether its tokens are targets)], as in CHAT_TEMPLATE.

    >>> pieces_of([{"role": "assistant", "content": "Ho"}])[2:4]
    [('Ho', True), ('<|im_end|>', True)]
    """
    pieces = []
    for message in messages:
        role, text = message["role"], message["content"].strip()
        pieces.append((IM_START, False))
        if records.is_learned(message):  # a reply, unless its weight is 0: then it is only read
            pieces += [("assistant\n", False), (text, True), (IM_END, True)]
        else:
            pieces += [(f"{role}\n{text}", False), (IM_END, False)]
        pieces.append(("\n", False))
    return pieces


def encode_pieces(conversations, tokenizer: Tokenizer):
    """Lists of pieces -> [(tokens, is_target)], two lists of one length."""
    texts = list({text for pieces in conversations for text, _ in pieces})
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    encoded = []
    for pieces in conversations:
        tokens, is_target = [], []
        for text, flag in pieces:
            piece = [tokenizer.control(text)] if isinstance(text, Control) else ids[text]
            tokens += piece
            is_target += [flag] * len(piece)
        encoded.append((tokens, is_target))
    return encoded


def encode_chat(messages, tokenizer: Tokenizer):
    """Messages -> (tokens, is_target), two lists of one length."""
    return encode_pieces([pieces_of(messages)], tokenizer)[0]


def with_system(messages, system):
    """The messages, led by the system turn `system` unless they begin with one of their own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_pieces(messages, system=None):
    """The pieces of a prompt: messages, led by `system`, up to where the reply begins."""
    return [*pieces_of(with_system(messages, system)), (IM_START, False), ("assistant\n", False)]


def encode_prompt(messages, tokenizer: Tokenizer, system=None):  # -> tokens
    return encode_pieces([prompt_pieces(messages, system)], tokenizer)[0][0]


# ---- other models' templates, and the view (skip at first)

def default_system(template, folder="the model"):
    """The system turn that a chat template adds, or None. UserError: it writes other turns."""
    turns = [{"role": role, "content": f"{role}: KIND, 'x' < {{1}}\n\n\té."}
             for role in ("user", "assistant", "user", "assistant", "user")]
    trials = turns[:1], turns, [{**turns[0], "role": "system"}, *turns]
    names = {"add_generation_prompt": True, "bos_token": "<bos>", "eos_token": "<eos>"}
    with suppress(Exception):  # whatever somebody else's program stumbles over
        jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        played = [jinja.from_string(template).render(names, messages=trial) for trial in trials]
        _, found, rest = played[0].partition(f"{IM_START}system\n")
        system = rest.partition(IM_END)[0] if found else None
        ours = ["".join(text for text, _ in prompt_pieces(trial, system)) for trial in trials]
        if played == ours:
            return system
    raise UserError(f"{folder} has a chat template that does not write the turns of chat.py: use "
                    "another model, or continue a text with sample.py --format plain")


def coloured(tokens, is_target, tokenizer: Tokenizer, colour=True):
    """Tokens as text for the terminal, targets in green (without colours: in «»)."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    shown = ""
    for flag, run in groupby(zip(tokens, is_target, strict=True), key=lambda pair: bool(pair[1])):
        text = printable(tokenizer.decode([token for token, _ in run], with_control=True))
        shown += before + text + after if flag else text
    return shown


def token_rows(tokens, is_target, tokenizer: Tokenizer):
    """A row of text per token: its id, whether it is a target, its text, quoted if it is text."""
    for token, flag in zip(tokens, is_target, strict=True):
        text = tokenizer.decode([token], with_control=True)
        shown = repr(text) if tokenizer.decode([token]) else text
        yield f"{token:6}  {'target' if flag else '':6}  {shown}"


@dataclass
class ViewConfig:
    file: list[str] = option(None, "a data file; optionally, a model whose tokenizer to use")
    tokens: bool = option(False, "a row per token: its id, whether it is a target, its text")


def main():
    """Show the first five records of a file, targets marked."""
    config = parse(ViewConfig, sys.argv[1:], main.__doc__)
    name, model = [*config.file, "instruct-q4"][:2]  # the model is optional
    tokenizer = Tokenizer(hub.find_weights(model).path)
    for conversation in islice(records.read_conversations(hub.find_data(name).files[0]), 5):
        tokens, is_target = encoded = encode_chat(conversation.messages, tokenizer)
        say(f"--- {conversation.source}: {len(tokens)} tokens, {sum(is_target)} of them targets")
        print("\n".join(token_rows(*encoded, tokenizer)) if config.tokens else
              coloured(*encoded, tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    run_program(main)
