"""A model folder with all that it takes to talk to it: network, tokenizer, format, stop tokens."""

from dataclasses import asdict

import torch

from parrot import fast
from parrot.chat import CHAT_TEMPLATE, default_system, encode_prompt
from parrot.fast.packed import pack
from parrot.files import model_folder
from parrot.files.tokenizer import Tokenizer
from parrot.model import Llama
from parrot.system.console import UserError


def load_parts(folder, dtype=torch.float32, device="cpu"):
    """A model folder -> (Llama, Tokenizer), checked to fit each other. Raises UserError."""
    tokenizer, model = Tokenizer(folder), Llama.load(folder, dtype, device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's "
                        f"embedding {model.config.vocab_size}")
    return model, tokenizer


def save(folder, model: Llama, tokenizer: Tokenizer, dtype):
    """Write a trained model as a folder, in `dtype`."""
    tensors = {name: parameter.detach().to("cpu", dtype)
               for name, parameter in model.named_parameters()}
    model_folder.write(folder, asdict(model.config), tensors, tokenizer, CHAT_TEMPLATE)


class Assistant:
    """A model to talk to: in turns if it `chats`, otherwise it only continues a text."""

    def __init__(self, name, model: Llama, tokenizer: Tokenizer, format="auto"):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        template = tokenizer.chat_template
        self.chats = format == "chat" or (format == "auto" and template is not None)
        self.stop = model_folder.stop_tokens(tokenizer, self.chats)  # the ids that end a reply
        self.system = None  # the system turn that its template adds by itself
        if self.chats and template:
            self.system = default_system(template, tokenizer.folder)

    @classmethod
    def load(cls, name, folder, dtype, device, format="auto", batched=True):
        """A model folder -> Assistant; batched: to write several replies at once."""
        model, tokenizer = load_parts(folder, dtype, device)
        if fast.enabled:  # fast/packed.py
            model = pack(model, batched)
        return cls(name, model, tokenizer, format)

    def prompt(self, messages):
        """The tokens that the reply follows: the template around all turns, or the bare text."""
        if self.chats:
            return encode_prompt(messages, self.tokenizer, self.system)
        return self.tokenizer.encode(messages[-1]["content"])
