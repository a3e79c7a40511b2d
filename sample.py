"""Ask a model: one prompt, a chat in the terminal, or several models side by side.

    python sample.py --prompt "Who are you?"
    python sample.py                                            a chat
    python sample.py --compare instruct-q4 out/quickstart --prompt "Who are you?"

The reply goes to stdout and nothing else does.
"""

import shutil
import sys
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from parrot import fast
from parrot.assistant import Assistant
from parrot.config import SampleConfig
from parrot.fast.packed import keeps_bfloat16
from parrot.files import hub
from parrot.sampling import generate
from parrot.system.command_line import parse
from parrot.system.console import UserError, printable, refuse, run_program, say, side_by_side
from parrot.system.device import pick


def main():  # one prompt, several models side by side, or a chat
    config = parse(SampleConfig, sys.argv[1:], __doc__.splitlines()[0])
    fast.enabled = not config.plain
    question = [{"role": "user", "content": config.prompt}]
    if config.compare:
        texts = [printable(f"{name}\n\n{reply(load(name, config), question, config)}")
                 for name in config.compare]
        return print(side_by_side(texts, shutil.get_terminal_size().columns))
    assistant = load(config.model or newest_run(), config)
    if config.prompt is None:
        return chat(assistant, config)
    text = reply(assistant, question, config, stream=config.num_samples == 1)
    if config.num_samples > 1:
        print(printable(text))


def newest_run():
    """The folder that was trained last, of the two that train.py writes by default."""
    models = [path for name in ("littleparrot", "quickstart")
              if (path := Path("out", name, "model.safetensors")).is_file()]
    if not models:
        raise UserError("no run yet: python train.py --quickstart, or use --model instruct-q4")
    return str(max(models, key=lambda path: path.stat().st_mtime).parent)


def load(name, config: SampleConfig) -> Assistant:
    """The model that --model or --compare names. Raises UserError."""
    device, dtype = pick(config.device, config.dtype)
    batched = config.num_samples > 1
    if config.dtype == "bfloat16" and fast.enabled and not batched and keeps_bfloat16(device):
        dtype = torch.bfloat16  # in memory, whatever the products are in: fast/packed.py
    folder = hub.find_weights(name).path
    assistant = Assistant.load(name, folder, dtype, device, config.format, batched)
    if config.system is not None:
        refuse(name, {"has no chat template, so no --system: see --format": not assistant.chats})
        assistant.system = config.system
    return assistant


def reply(assistant: Assistant, messages, config: SampleConfig, stream=False):
    """Write --num-samples replies, return their text. stream: show one as it is written."""
    tokenizer, decoder = assistant.tokenizer, DecodeStream(skip_special_tokens=True)

    def show(written):  # what the newest token adds; half a character has to wait
        text = decoder.step(tokenizer.backend, written[0][-1])
        print(printable(text or ""), end="", flush=True)
    generator = torch.Generator()
    generator.seed() if config.seed is None else generator.manual_seed(config.seed)
    written = generate(
        assistant.model, [assistant.prompt(messages)], assistant.stop, generator=generator,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
        repetition_penalty=config.repetition_penalty, samples_each=config.num_samples,
        show=show if stream else None)
    if stream:
        print(flush=True)
    if cut := [len(tokens) for tokens, ended in written if not ended]:
        say(f"[{assistant.name}: cut after {cut[0]} tokens]")
    texts = [tokenizer.decode(tokens) for tokens, _ in written]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def chat(assistant: Assistant, config: SampleConfig):
    """A conversation that remembers its turns, until an empty line, Ctrl-D or Ctrl-C."""
    if not assistant.chats:
        raise UserError("a chat needs a model with a chat template: give a --prompt to continue")
    say(f"Chatting with {assistant.name}. An empty line ends the chat.")
    messages, context = [], assistant.model.config.max_position_embeddings
    while True:
        print("you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip() if sys.stdin else ""
        if not line:
            say("")
            return
        messages.append({"role": "user", "content": line})
        while len(assistant.prompt(messages)) > context * 3 // 4 and len(messages) > 1:
            messages = messages[2:]  # the oldest question and its reply
            say("[the oldest turn is forgotten: the context is full]")
        try:
            text = reply(assistant, messages, config, stream=True)
            messages.append({"role": "assistant", "content": text})
        except UserError as error:  # it does not fit: the chat goes on without it
            say(f"[{error}]")
            messages.pop()


if __name__ == "__main__":
    run_program(main)
