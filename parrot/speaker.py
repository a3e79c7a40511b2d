"""A model with all that it takes to talk to it: its tokenizer, its format, where it stops."""

from dataclasses import dataclass

from parrot import packed, weights
from parrot.chat import default_system, encode_prompt
from parrot.model import Llama
from parrot.tokenizer import Tokenizer


@dataclass
class Speaker:
    """A loaded model folder."""
    name: str
    model: Llama
    tokenizer: Tokenizer
    stop: set  # the ids that end a reply
    chats: bool  # or just goes on with the text
    system: str | None  # the system turn that its template puts in by itself

    @classmethod
    def load(cls, name, folder, dtype, device, format="auto", pack=True):
        """A model folder -> Speaker, called `name`.

        format: chat, plain, or auto: as the folder is. pack: take up to a second now to write faster then.
        """
        model, tokenizer = weights.load(folder, dtype, device)
        if pack:
            packed.pack(model)
        return cls.of(name, model, tokenizer, format)

    @classmethod
    def of(cls, name, model, tokenizer, format="auto"):
        """A model that is loaded already -> Speaker."""
        chats = format == "chat" or (format == "auto" and tokenizer.chat_template is not None)
        system = default_system(tokenizer.chat_template) if chats and tokenizer.chat_template else None
        return cls(name, model, tokenizer, weights.stop_tokens(tokenizer, chats), chats, system)

    def prompt(self, messages):
        """The tokens that the reply follows: the template around all turns, or the bare text."""
        if self.chats:
            return encode_prompt(messages, self.tokenizer, self.system)
        return self.tokenizer.encode(messages[-1]["content"])
