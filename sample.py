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

from parrot import hub
from parrot.config import SampleConfig, parse
from parrot.console import UserError, printable, run_program, say, side_by_side
from parrot.device import pick
from parrot.sampling import check_room, generate, replies
from parrot.speaker import Speaker
from parrot.tokenizer import StreamDecoder


def main():
    """Read the command line, and answer in the form that it asks for."""
    config = parse(SampleConfig, sys.argv[1:], __doc__.splitlines()[0])
    if config.compare:
        columns = [[name, "", *numbered(reply_texts(load_speaker(name, config), config.prompt, config))]
                   for name in config.compare]
        print(side_by_side(columns, shutil.get_terminal_size().columns))
        return
    speaker = load_speaker(config.model or newest_run(), config)
    if config.prompt is None:
        chat(speaker, config)
    elif config.num_samples > 1:
        print("\n\n".join(numbered(reply_texts(speaker, config.prompt, config))))
    else:
        stream(speaker, speaker.prompt([{"role": "user", "content": config.prompt}]), config)


def newest_run():
    """The folder that was trained last, of the two that train.py writes by default."""
    runs = [Path(p) for p in ("out/littleparrot", "out/quickstart") if Path(p, "model.safetensors").is_file()]
    if not runs:
        raise UserError("nothing has been trained yet. Run: python train.py --quickstart   "
                        "(or name a model: --model instruct-q4)")
    return str(max(runs, key=lambda path: (path / "model.safetensors").stat().st_mtime))


def load_speaker(name, config):
    """Load the model `name` in the format that was asked for."""
    device, dtype = pick(config)
    one_reply = config.prompt is not None and config.num_samples == 1  # is written sooner than the weights are packed
    return Speaker.load(name, hub.find_weights(name).path, dtype, device, config.format, pack=not one_reply)


def how(speaker, config):
    """The settings for sampling.generate."""
    generator = torch.Generator(speaker.model.device)
    generator.seed() if config.seed is None else generator.manual_seed(config.seed)
    return {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
            "top_p": config.top_p, "repetition_penalty": config.repetition_penalty, "generator": generator}


def stream(speaker, prompt, config):
    """Print one reply as it is written; returns its text."""
    decoder = StreamDecoder(speaker.tokenizer)
    for token, in generate(speaker.model, [prompt], speaker.stop, **how(speaker, config)):
        print(printable(decoder.step(token)), end="", flush=True)
    print(printable(decoder.finish()), flush=True)
    tell_if_cut(speaker, len(prompt), len(decoder.tokens), config)
    return speaker.tokenizer.decode(decoder.tokens)


def reply_texts(speaker, text, config):
    """The texts of --num-samples replies to `text`, written together."""
    prompt = speaker.prompt([{"role": "user", "content": text}])
    written = replies(speaker.model, [prompt], speaker.stop, samples_each=config.num_samples, **how(speaker, config))
    tell_if_cut(speaker, len(prompt), max(len(tokens) for tokens, _ in written), config)
    return [printable(speaker.tokenizer.decode(tokens)) for tokens, _ in written]


def tell_if_cut(speaker, prompt_length, written, config):
    """A word on stderr where a reply did not end by itself."""
    room = check_room([prompt_length], speaker.model.config, config.max_new_tokens)
    if written == room:
        why = (f"--max-new-tokens {config.max_new_tokens}" if room == config.max_new_tokens else
               f"the end of the model's context ({speaker.model.config.max_position_embeddings} tokens)")
        say(f"[{speaker.name}: cut at {why}]")


def chat(speaker, config):
    """A conversation that remembers its turns, until an empty line, Ctrl-D or Ctrl-C."""
    if not speaker.chats:
        raise UserError("a chat needs a model with a chat template, and not --format plain. Give a --prompt to go on with.")
    say(f"Chatting with {speaker.name}. An empty line ends the chat.")
    messages = []
    while True:
        print("you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip() if sys.stdin else ""
        if not line:
            say("")
            return
        messages.append({"role": "user", "content": line})
        context = speaker.model.config.max_position_embeddings
        while len(prompt := speaker.prompt(messages)) > context * 3 // 4 and len(messages) > 1:
            messages = messages[2:]  # the oldest question and its reply
            say("[the oldest turn is forgotten: the context is full]")
        try:
            messages.append({"role": "assistant", "content": stream(speaker, prompt, config)})
        except UserError as error:  # it does not fit: the chat goes on without it
            say(f"[{error}]")
            messages.pop()


def numbered(texts):
    """Give several texts numbers; leave a single one as it is."""
    return texts if len(texts) == 1 else [f"[{i}] {text}" for i, text in enumerate(texts, 1)]


if __name__ == "__main__":
    run_program(main)
