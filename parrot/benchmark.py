"""How fast is it here? Our own figures on this machine, beside what the machine could do.

    python -m parrot.benchmark

Training and sampling are timed on the real model, and held against two limits: the rate of one
large matrix product (train.py measures it for itself), and that of reading memory. Medians.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from parrot import hub, packed, weights
from parrot.config import BenchmarkConfig, parse
from parrot.console import UserError, run_program
from parrot.device import pick
from parrot.files import read_json
from parrot.limits import matrix_rate, memory_rate, seconds
from parrot.sampling import generate

ROOT = Path(__file__).parent.parent


def training(folder, config):
    """train.py for a few steps -> its medians of tokens a second and of its share of the limit, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        command = [sys.executable, str(ROOT / "train.py"), "--weights", str(folder), "--out", str(out), "--val-fraction", "0",
                   "--epochs", str(config.steps + 1), "--max-steps", str(config.steps + 1)]
        for name in ("data", "batch_size", "micro_batch_tokens", "max_length", "compile", "device", "dtype"):
            if (value := getattr(config, name)) is not None:
                command += ["--" + name.replace("_", "-"), str(value)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"train.py ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        tokens, share = (statistics.median(step[key] for step in steps[1:]) for key in ("tokens_per_second", "share_of_limit"))
        return tokens, share, read_json(out / "run.json")["peak_memory"]


def writing(model, samples, tokens=64):
    """Tokens a second of so many replies at once, reading the prompt not counted."""
    times = []
    for _ in generate(model, [list(range(20, 60))], set(), max_new_tokens=tokens, temperature=0.7 if samples > 1 else 0,
                      top_p=0.9, samples_each=samples):
        times.append(time.perf_counter())
    return samples / statistics.median(after - before for before, after in zip(times, times[1:]))


def first_word(folder, device, dtype):
    """Seconds from starting sample.py to the first piece of its reply."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--prompt", "Tell me a story.", "--max-new-tokens", "8",
               "--device", device.type, "--dtype", dtype]

    def work():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            if not process.stdout.read(1):
                raise UserError("sample.py wrote nothing: " + " ".join(command))
    return seconds(work, torch.device("cpu"), times=3)


def measure(config):
    """Yield (name, figure in SI units) of all figures."""
    device, dtype = pick(config)
    folder = hub.find_weights(config.weights).path.absolute()  # a path, even if it is called "base"
    yield "matrix product, FLOP/s", matrix_rate(device, dtype)
    memory = memory_rate(device)
    yield "memory read, byte/s", memory
    yield "sample.py to its first word, s", first_word(folder, device, config.dtype)
    tokens, share, peak = training(folder, config)
    yield "training, tokens/s", tokens
    yield "training, share of the matrix product's rate", share
    if peak:
        yield "training, peak memory, byte", peak
    model = weights.load_model(folder, dtype, device)
    size = sum(p.nbytes for p in model.parameters())
    packed.pack(model)
    one = writing(model, 1)
    yield "one reply, tokens/s", one
    yield "one reply, share of the memory's rate", one * size / memory
    yield "16 replies, tokens/s together", writing(model, 16)


def in_words(name, value):
    """A figure as people read it.

    >>> in_words("memory read, byte/s", 2.5e10), in_words("one reply, share", 0.5)
    ('25 G', '50%')
    """
    if "share" in name:
        return f"{value:.0%}"
    for power, letter in ((1e12, " T"), (1e9, " G")):
        if value >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main():
    """Read the command line, measure, print a table."""
    config = parse(BenchmarkConfig, sys.argv[1:], __doc__.splitlines()[0])
    found = dict(tqdm(measure(config), total=9, desc="measuring", leave=False))
    device, _ = pick(config)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(json.dumps(found, indent=2) if config.json else "\n".join(
        [f"{device}, {chip}, torch {torch.__version__}, {config.dtype}, {config.weights} on {config.data}",
         *(f"{in_words(name, value):>10}  {name}" for name, value in found.items())]))


if __name__ == "__main__":
    run_program(main)
