"""How fast is it here? Our own figures on this machine, beside what the machine could do.

    python -m parrot.benchmark

Training and sampling are timed on the real model, and held against two limits measured in
the same run: the rate of one large matrix product, and that of reading memory. Medians.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from parrot import hub, packed, weights
from parrot.compiling import compile_blocks
from parrot.config import BenchmarkConfig, TrainConfig, parse
from parrot.console import UserError, run_program
from parrot.data import Batch, examples_of_step, load_examples, micro_batches
from parrot.device import keep_memory, pick_device, pick_dtype, tokens_a_forward
from parrot.limits import flop_of, matrix_rate, memory_rate, seconds
from parrot.optim import make_optimizer
from parrot.sampling import generate
from parrot.training import accumulate_gradients

SAMPLE = Path(__file__).parent.parent / "sample.py"


def training(model, examples, config, device, dtype):
    """Whole optimizer steps -> {tokens a second, FLOP a second, peak memory in bytes}."""
    give_memory_back = keep_memory()
    compile_blocks(model, config.compile, 0, dtype)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-6))
    speeds, rates = [], []
    for step in tqdm(range(config.steps + 1), desc="training", unit="step", leave=False):
        indices = examples_of_step(step, examples, config.batch_size, 0)
        budget = config.micro_batch_tokens or tokens_a_forward(model, dtype)
        started = time.perf_counter()
        batches = [Batch.of(examples, some, device) for some in micro_batches(indices, examples.lengths, None, budget)]
        supervised = sum(len(batch.targets) for batch in batches)
        accumulate_gradients(model, batches, supervised, dtype)
        optimizer.step()
        optimizer.zero_grad()
        give_memory_back()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken, lengths = time.perf_counter() - started, examples.lengths[indices].tolist()
        speeds.append(sum(lengths) / taken)
        rates.append(flop_of(model, lengths, supervised) / taken)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return {"tokens": statistics.median(speeds[1:]), "flop": statistics.median(rates[1:]), "memory": peak}


def writing(model, samples, tokens=64):
    """Tokens a second of so many replies at once, reading the prompt not counted."""
    times = []
    for _ in generate(model, [list(range(20, 60))], set(), max_new_tokens=tokens, temperature=0.7 if samples > 1 else 0,
                      top_p=0.9, samples_each=samples):
        times.append(time.perf_counter())
    return samples / statistics.median(after - before for before, after in zip(times, times[1:]))


def first_word(folder, device, dtype):
    """Seconds from starting sample.py to the first piece of its reply."""
    command = [sys.executable, str(SAMPLE), "--model", str(folder), "--prompt", "Tell me a story.", "--max-new-tokens", "8",
               "--device", device.type, "--dtype", dtype]

    def work():
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            if not process.stdout.read(1):
                raise UserError("sample.py wrote nothing: " + " ".join(command))
    return seconds(work, torch.device("cpu"), times=3)


def measure(config):
    """All figures -> {name: number}, in SI units."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder = hub.find_weights(config.weights).path
    found = {"matrix product, FLOP/s": matrix_rate(device, dtype), "memory read, byte/s": memory_rate(device)}
    found["sample.py to its first word, s"] = first_word(folder, device, config.dtype)

    model = weights.load_model(folder, dtype, device)
    size = sum(p.nbytes for p in model.parameters())
    if packed.pays(device, dtype):
        packed.pack(model)
    found["one reply, tokens/s"] = writing(model, 1)
    found["one reply, share of the memory's rate"] = found["one reply, tokens/s"] * size / found["memory read, byte/s"]
    found["16 replies, tokens/s together"] = writing(model, 16)

    model, tokenizer = weights.load(folder, torch.float32, device)
    examples, _, _ = load_examples(hub.find_data(config.data).path, tokenizer, config.max_length, 0.0)
    trained = training(model, examples, config, device, dtype)
    found["training, tokens/s"] = trained["tokens"]
    found["training, share of the matrix product's rate"] = trained["flop"] / found["matrix product, FLOP/s"]
    found["training, peak memory, byte"] = trained["memory"]
    return found


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
    found = measure(config)
    device = pick_device(config.device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(json.dumps(found, indent=2) if config.json else "\n".join(
        [f"{device}, {chip}, torch {torch.__version__}, {config.dtype}, {config.weights} on {config.data}",
         *(f"{in_words(name, value):>10}  {name}" for name, value in found.items())]))


if __name__ == "__main__":
    run_program(main)
