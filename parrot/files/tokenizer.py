"""Text <-> tokens: the byte-level BPE of a model folder, used safely.

A *control token* such as `<|im_end|>` is one id that no text can spell here: typed by a user, it
becomes ordinary tokens that end no turn. Only code that asks for `control(...)` gets the id.
"""

import re
from pathlib import Path

import tokenizers

from parrot.system.console import UserError, refuse
from parrot.system.disk import open_to_read, read_json

KINDS = tokenizers.models.BPE, tokenizers.decoders.ByteLevel  # of model and decoder
CONTROL = END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LETTERS = "".join(map(chr, [*range(32, 2048), *range(0x1000, 0xD000, 0x1000), 0xE000, 0xF000]))
TRIAL = ("<|im_start|>system\nBe KIND.<|im_end|>\n<|im_start|>user\nNaïve e\u0301 漢 🦜's\n\n\tx  y"
         f"{LETTERS}<|im_end|>\n<|im_start|>assistant\n1. Ho<|im_end|>\n"
         "<|im_start|>assistant\né<|im_end|>\n")


class Tokenizer:
    """The tokenizer.json of a model folder, and the folder's chat template if it has one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        try:
            self.content = open_to_read(path).read()
            self.backend = tokenizers.Tokenizer.from_buffer(self.content)
            self.backend.no_truncation()
            self.backend.no_padding()
            whole = self.backend.encode(TRIAL).ids  # as other software does it
            self.backend.encode_special_tokens = True  # what spells a special token stays text
            known = [name for name in CONTROL if self.backend.token_to_id(name) is not None]
            self.backend.add_special_tokens(known)  # the file may not mark them as special
            # What changes text, or joins it over the seams of chat.pieces_of, is refused.
            kinds = type(self.backend.model), type(self.backend.decoder)
            pieces = re.split(r"(<\|im_\w+\|>|(?<=assistant\n))", TRIAL)
            tokens = [[self.control(piece)] if piece in known else self.encode(piece)
                      for piece in pieces]
            refuse(path, {
                "is not a byte-level BPE like SmolLM2's (or has dropout, or a normalizer)":
                    kinds != KINDS or self.backend.model.dropout or self.backend.normalizer,
                "changes text: it does not come back": self.decode(self.encode(TRIAL)) != TRIAL,
                "encodes a conversation differently from its pieces":
                    IM_END in known and sum(tokens, []) != whole})
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:  # a panic in the library's Rust code is not an Exception
            raise UserError(f"{path} is not a tokenizer that works here: {error}") from None
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1  # with holes
        self.chat_template = read_chat_template(self.folder)

    def control(self, name: str) -> int:  # its id; UserError if the tokenizer has none
        token = self.backend.token_to_id(name)
        refuse(self.folder, {f"cannot chat: no token {name} (see --format plain)": token is None})
        return token

    def encode(self, text: str) -> list[int]:
        """Text -> ids, control tokens never among them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Many texts at once, on all cores; a lone surrogate becomes a question mark."""
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return [e.ids for e in self.backend.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, tokens, with_control=False) -> str:
        """Ids -> text; control tokens are left out, or stand there by name."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=not with_control)


def read_chat_template(folder):  # or None
    path = folder / "chat_template.jinja"  # where newer folders keep it
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    refuse(path, {"has a chat template that is not text": not isinstance(template or "", str)})
    return template or None
