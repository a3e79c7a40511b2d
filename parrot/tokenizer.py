"""Text <-> tokens: the byte-level BPE of a model folder, used safely.

A *control token* such as `<|im_end|>` is one id that no text can spell here: the same
characters inside a user's message become ordinary tokens, so nobody can end a turn or open
a system turn by typing. Only code that asks for `control(...)` gets the id.
"""

from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from parrot.console import UserError
from parrot.files import read_json

CONTROL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Tokenizer:
    """The tokenizer of a model folder.

    folder: holds tokenizer.json, and perhaps tokenizer_config.json with a chat template.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: the folder has no tokenizer")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer: {error}") from None
        self.backend.encode_special_tokens = True  # "<|im_end|>" in a text is just text, if it is marked as special
        self.backend.add_special_tokens([name for name in CONTROL if self.backend.token_to_id(name) is not None])
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = self.backend.get_vocab_size()
        self.chat_template = self._read_chat_template()

    def _read_chat_template(self):
        separate = self.folder / "chat_template.jinja"  # where newer folders keep it
        if separate.is_file():
            return separate.read_text(encoding="utf-8", errors="replace")
        path = self.folder / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):  # several, by name
            template = next((each.get("template") for each in template
                             if isinstance(each, dict) and each.get("name") == "default"), None)
        if not isinstance(template, str | None):
            raise UserError(f"{path}: chat_template is not text but {template!r:.60}")
        return template

    def control(self, name):
        """The id of a control token; UserError where the tokenizer has no such token."""
        token = self.backend.token_to_id(name)
        if token is None:
            raise UserError(f"the tokenizer of {self.folder} has no {name}: this model cannot "
                            "chat in ChatML. Take another, or let sample.py --format plain go on with a text")
        return token

    def encode(self, text):
        """Text -> list of ids, control tokens never among them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Many texts at once, on all cores; a lone surrogate becomes a question mark."""
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return [each.ids for each in self.backend.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, tokens):
        """Ids -> text, control tokens left out."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=True)

    def decode_with_control(self, tokens):
        """Ids -> text, control tokens shown by name."""
        return self.backend.decode(list(map(int, tokens)), skip_special_tokens=False)


class StreamDecoder:
    """Text piece by piece as tokens come, never a part of a UTF-8 character.

    A character may be spread over several tokens; its bytes wait until it is whole.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens, self.length = [], 0

    def step(self, token):
        """The text that this token completes, often its own, sometimes none."""
        self.tokens.append(int(token))
        text = self.stream.step(self.tokenizer.backend, int(token)) or ""
        self.length += len(text)
        return text

    def finish(self):
        """What was still waiting when the reply ended (an unfinished character: U+FFFD)."""
        return self.tokenizer.decode(self.tokens)[self.length:]
