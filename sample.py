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

from parrot import fast
from parrot.assistant import Assistant
from parrot.config import SampleConfig
from parrot.fast.packed import pays
from parrot.files import hub
from parrot.files.tokenizer import StreamDecoder
from parrot.sampling import check_room, generate, replies
from parrot.system.command_line import parse
from parrot.system.console import UserError, printable, run_program, say, side_by_side
from parrot.system.device import pick


def main():
    config = parse(SampleConfig, sys.argv[1:], __doc__.splitlines()[0])
    fast.enabled = not config.plain
    if config.compare:
        texts = [f"{printable(name)}\n\n{several_replies(load(name, config), config)}"
                 for name in config.compare]
        print(side_by_side(texts, shutil.get_terminal_size().columns))
        return
    assistant = load(config.model or newest_run(), config)
    if config.prompt is None:
        chat(assistant, config)
    elif config.num_samples > 1:
        print(several_replies(assistant, config))
    else:
        prompt = assistant.prompt([{"role": "user", "content": config.prompt}])
        stream_reply(assistant, prompt, config)


def newest_run():
    """The folder that was trained last, of the two that train.py writes by default."""
    models = [path for name in ("littleparrot", "quickstart")
              if (path := Path("out", name, "model.safetensors")).is_file()]
    if not models:
        raise UserError("nothing has been trained yet. Run: python train.py --quickstart   "
                        "(or name a model: --model instruct-q4)")
    return str(max(models, key=lambda path: path.stat().st_mtime).parent)


def load(name, config) -> Assistant:
    device, dtype = pick(config.device, config.dtype)
    many = config.num_samples > 1
    if config.dtype == "bfloat16" and fast.enabled and not many and pays(device):
        dtype = torch.bfloat16  # in memory, whatever the products are in: fast/packed.py
    folder = hub.find_weights(name).path
    assistant = Assistant.load(name, folder, dtype, device, config.format, many)
    if config.system is not None and not assistant.chats:
        raise UserError(f"{name} has no chat template, so it reads no --system: see --format chat")
    if config.system is not None:
        assistant.system = config.system
    return assistant


def settings(config):
    names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
    generator = torch.Generator()
    generator.seed() if config.seed is None else generator.manual_seed(config.seed)
    return {"generator": generator, **{name: getattr(config, name) for name in names}}


def stream_reply(assistant: Assistant, prompt, config):
    """Print one reply as it is written; returns its text."""
    decoder = StreamDecoder(assistant.tokenizer)
    for [token] in generate(assistant.model, [prompt], assistant.stop, **settings(config)):
        print(printable(decoder.step(token)), end="", flush=True)
    print(printable(decoder.finish()), flush=True)
    say_if_cut(assistant, prompt, decoder.tokens, config)
    return assistant.tokenizer.decode(decoder.tokens)


def several_replies(assistant: Assistant, config):
    """The text of --num-samples replies, written together; numbered, if more than one."""
    prompt = assistant.prompt([{"role": "user", "content": config.prompt}])
    written = replies(assistant.model, [prompt], assistant.stop, samples_each=config.num_samples,
                      **settings(config))
    say_if_cut(assistant, prompt, max((tokens for tokens, _ in written), key=len), config)
    texts = [printable(assistant.tokenizer.decode(tokens)) for tokens, _ in written]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def say_if_cut(assistant: Assistant, prompt, reply, config):
    """A word on stderr where a reply did not end by itself."""
    if len(reply) == check_room([len(prompt)], assistant.model.config, config.max_new_tokens):
        say(f"[{assistant.name}: cut after {len(reply)} tokens]")


def chat(assistant: Assistant, config):
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
        while len(prompt := assistant.prompt(messages)) > context * 3 // 4 and len(messages) > 1:
            messages = messages[2:]  # the oldest question and its reply
            say("[the oldest turn is forgotten: the context is full]")
        try:
            reply = stream_reply(assistant, prompt, config)
            messages.append({"role": "assistant", "content": reply})
        except UserError as error:  # it does not fit: the chat goes on without it
            say(f"[{error}]")
            messages.pop()


if __name__ == "__main__":
    run_program(main)
