"""How fast is it here? Our own figures on this machine, beside the limits of the machine.

    python tests/benchmarks/speed.py

Training and sampling are timed on the real model. Two limits stand beside them: the rate of one
large matrix product, which bounds training, and the rate of reading memory, which bounds the
writing of one reply. All figures are medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parrot import assistant
from parrot.assistant import Assistant
from parrot.config import DEVICES, DTYPES
from parrot.data import load_examples
from parrot.fast.packed import keeps_bfloat16
from parrot.files import hub
from parrot.sampling import generate
from parrot.system.console import UserError, run_program
from parrot.system.device import pick
from parrot.system.disk import read_json

ROOT = Path(__file__).resolve().parents[2]


# ---- the limits

def seconds(work, device, times=5):
    """The median time of `work()`, after one call that does not count."""
    durations = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[1:])


def matrix_rate(device, dtype):
    """FLOP per second of one large matrix product in `dtype`."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def memory_rate(device):
    """Bytes per second of reading memory that no cache holds."""
    numbers = torch.ones(2**27, device=device)  # half a gigabyte
    return numbers.nbytes / seconds(lambda: numbers.sum(), device)


def flop_per_token(model, lengths, share_of_targets):
    """FLOP of forward and backward, per token of examples of `lengths` (a float array).

    A matrix product with W costs 2 FLOP for each weight and row, its backward twice that.
    Attention is counted within each example and only into the past, the last matrix only for the
    rows that have a target.
    """
    config = model.config
    projections = sum(parameter.numel() for name, parameter in model.named_parameters()
                      if "_proj" in name)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = 2 * width * (lengths**2).sum() / lengths.sum()
    head = 2 * config.vocab_size * config.hidden_size * share_of_targets
    return 3 * (2 * projections + attention + head)


# ---- what is timed

def train(folder, args):
    """train.py for a few steps -> tokens per second (median), peak memory in bytes or None."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "run")
        steps = str(args.steps + 1)  # the first does not count
        command = [sys.executable, str(ROOT / "train.py"), "--weights", str(folder), "--out",
                   str(out), "--val-fraction", "0", "--epochs", steps, "--max-steps", steps]
        for name in ("data", "batch_size", "compile", "device", "dtype"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"train.py ended with status {done.returncode}: "
                            f"{done.stderr.strip()[-300:]}")
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line)["tokens_per_second"] for line in lines]
        return statistics.median(rates[1:]), read_json(out / "run.json")["peak_memory"]


def write(assistant: Assistant, samples, num_tokens=64):
    """Tokens per second of so many replies at once; reading the prompt does not count."""
    prompt = list(range(20, 60))
    times = []
    generate(assistant.model, [prompt], set(), max_new_tokens=num_tokens, top_p=0.9,
             temperature=0.7 if samples > 1 else 0, samples_each=samples,
             show=lambda replies: times.append(time.perf_counter()))
    durations = [after - before for before, after in zip(times, times[1:], strict=False)]
    return samples / statistics.median(durations)


def first_word(folder, device, dtype_name):
    """Seconds from starting sample.py to the first piece of its reply."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--prompt",
               "Tell me a story.", "--max-new-tokens", "8", "--device", device.type, "--dtype",
               dtype_name]

    def run():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            if not child.stdout.read(1):
                raise UserError("sample.py wrote nothing: " + " ".join(command))
    return seconds(run, torch.device("cpu"), times=3)


def measure(args):
    """{name: figure in SI units} of all figures. UserError."""
    device, dtype = pick(args.device, args.dtype)
    folder = hub.find_weights(args.weights).path.absolute()  # a path, even if it is called "base"
    figures = {"matrix product, FLOP/s": matrix_rate(device, dtype),
               "memory read, bytes/s": memory_rate(device),
               "sample.py to its first word, s": first_word(folder, device, args.dtype)}

    rate, peak = train(folder, args)
    model, tokenizer = assistant.load_parts(folder, dtype, device)
    examples, _, _ = load_examples(hub.find_data(args.data), tokenizer, 2048, 0.0)
    flop = flop_per_token(model, examples.lengths.astype(float), examples.parts[0][1].mean())
    figures["training, tokens/s"] = rate
    figures["training, share of the matrix product's rate"] = (
        rate * flop / figures["matrix product, FLOP/s"])
    if peak:
        figures["training, peak memory, bytes"] = peak

    kept = torch.bfloat16 if keeps_bfloat16(device) else dtype  # as sample.py
    size = kept.itemsize * sum(parameter.numel() for parameter in model.parameters())
    one = write(Assistant.load("", folder, kept, device, batched=False), 1)
    figures["one reply, tokens/s"] = one
    figures["one reply, share of the memory's rate"] = one * size / figures["memory read, bytes/s"]
    figures["16 replies, tokens/s together"] = write(Assistant.load("", folder, dtype, device), 16)
    return figures


# ---- the table

def in_words(name, value):
    """A figure as people read it.

    >>> in_words("memory read, bytes/s", 2.5e10), in_words("one reply, share", 0.5)
    ('25 G', '50%')
    """
    if "share" in name:
        return f"{value:.0%}"
    for power, letter in ((1e12, " T"), (1e9, " G")):
        if value >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def machine(device, dtype):
    """One line on where figures come from, to stand above every table."""
    chip = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    name = str(dtype).removeprefix("torch.")
    return f"{time.strftime('%Y-%m-%d')}, {device.type}, {chip}, torch {torch.__version__}, {name}"


def main():
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="instruct-q4", help="what train.py's --weights takes")
    parser.add_argument("--data", default="quickstart", help="what train.py's --data takes")
    parser.add_argument("--steps", type=int, default=3, help="training steps that are timed")
    parser.add_argument("--batch-size", type=int, default=64, help="examples in one step")
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--json", action="store_true", help="print JSON, in SI units")
    args = parser.parse_args()
    figures = measure(args)
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{machine(*pick(args.device, args.dtype))}, {args.weights} on {args.data}")
    for name, value in figures.items():
        print(f"{in_words(name, value):>10}  {name}")


if __name__ == "__main__":
    run_program(main)
