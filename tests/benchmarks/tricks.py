"""What each speed-up of parrot/fast buys on this machine, added one after the other.

    python tests/benchmarks/tricks.py

The first row of a table is --plain; each further row has one speed-up more than the row before.
Every row is a process of its own, the rows take turns, and medians count. Leave the machine alone
meanwhile.

The product has one switch for all of them, `fast.enabled`. Here single ones are off because the
name that reaches them is replaced by a plain form.
"""

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compare import exit_if_incomplete, print_result, print_table, rounds_of_children
from speed import machine, write

from parrot import assistant, attention, fast, sampling, training
from parrot.assistant import Assistant
from parrot.config import DEVICES, DTYPES, QUICKSTART, TrainConfig
from parrot.data import Batch, examples_of_step, load_examples, micro_batches
from parrot.fast import compiling
from parrot.fast.packed import keeps_bfloat16, pack
from parrot.files import hub
from parrot.system.device import peak_memory, pick, tokens_per_forward

ROWS = {  # table -> the speed-ups, in the order in which they are added
    "training, tokens/s": ["ribbon attention", "training graphs", "compile"],
    "one greedy reply, tokens/s": ["step by torch's attention", "captured step", "packed"],
    "16 sampled replies, tokens/s": ["step by torch's attention", "captured step", "nucleus",
                                     "packed"]}
ONLY_ON = {"nucleus": "cpu", "captured step": "cuda", "training graphs": "cuda"}


def nothing(*_, **__):
    """The plain form of what may be left out."""


def sort(probabilities, mass):
    return probabilities.sort(dim=-1, descending=True, stable=True)


PLAIN_FORMS = {  # speed-up -> what is in its place while it is off: module, name, plain form
    "ribbon attention": [(attention, "FastAttention", nothing)],  # then Ribbon takes the formula
    "training graphs": [(compiling, "CapturedForward", lambda model, longest: model.forward)],
    "compile": [(compiling, "compile_blocks", nothing)],
    "step by torch's attention": [(attention, "attention_by_torch", attention.attention)],
    "captured step": [(sampling, "CapturedStep", lambda model, cache: sampling.logits_after)],
    "nucleus": [(sampling, "likeliest", sort)],
    "packed": [(assistant, "pack", lambda model, batched: model)]}


@contextlib.contextmanager
def only(speed_ups):
    """Inside, these speed-ups are on and all others are off."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fast, "enabled", bool(speed_ups)))
        for name, replacements in PLAIN_FORMS.items():
            if name not in speed_ups:
                for module, attribute, plain_form in replacements:
                    stack.enter_context(mock.patch.object(module, attribute, plain_form))
        yield


# ---- what a child process does

def train(args):
    """Tokens per second of training as train.py does it, after one step that does not count."""
    device, dtype = pick(args.device, args.dtype)
    model, tokenizer = assistant.load_parts(hub.find_weights(args.weights).path, torch.float32, device)
    examples, _, _ = load_examples(hub.find_data(args.data), tokenizer, 2048, 0.0)
    max_tokens = tokens_per_forward(model, dtype)
    ribbon = attention.Ribbon([256] * (max_tokens // 256), device)
    if fast.enabled:
        compiling.speed_up(model, "on", dtype, ribbon, examples.longest, num_tokens=0)
    optimizer = training.make_optimizer(model, TrainConfig())
    num_tokens = 0
    for step in range(args.steps + 1):
        if step == 1:
            started, num_tokens = time.perf_counter(), 0
        indices = examples_of_step(step, examples, args.batch_size, 0)
        splits = micro_batches(indices, examples.lengths, None, max_tokens)
        take_step(model, optimizer, [Batch.of(examples, split, device) for split in splits], dtype)
        num_tokens += int(examples.lengths[indices].sum())
    return num_tokens / (time.perf_counter() - started)


def take_step(model, optimizer, batches, dtype):
    """One step of train.py's loop."""
    num_targets = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        training.loss_sum(model, batch, dtype).backward()
    for parameter in model.parameters():
        parameter.grad /= num_targets
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert math.isfinite(float(grad_norm))  # waits
    optimizer.step()
    optimizer.zero_grad()


def write_replies(args, samples):
    """Tokens per second of so many replies at once, reading the prompt not counted."""
    device, dtype = pick(args.device, args.dtype)
    folder = hub.find_weights(args.weights).path
    if samples == 1 and is_packed() and keeps_bfloat16(device):
        dtype = torch.bfloat16  # as sample.py
    return write(Assistant.load("", folder, dtype, device, batched=samples > 1), samples, args.tokens)


def is_packed():
    """Whether this row has fast/packed.py."""
    return fast.enabled and assistant.pack is pack


def run_row(title, num_speed_ups, args):
    """One row of a table in this process: tokens per second."""
    with only(speed_ups_of(title, args)[:num_speed_ups]):
        if title.startswith("training"):
            return train(args)
        return write_replies(args, 16 if title.startswith("16") else 1)


# ---- the tables

def speed_ups_of(title, args):
    """Those of this table that there are on this device."""
    device, _ = pick(args.device, args.dtype)
    return [name for name in ROWS[title] if ONLY_ON.get(name, device.type) == device.type]


def ratios_to_the_row_before(medians):
    """
    >>> ratios_to_the_row_before([10.0, 20.0, 30.0])
    [nan, 2.0, 1.5]
    """
    return [math.nan, *(now / before for before, now in zip(medians, medians[1:], strict=False))]


def parser():
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="instruct-q4", help="what train.py's --weights takes")
    parser.add_argument("--data", default="quickstart", help="what train.py's --data takes")
    parser.add_argument("--batch-size", type=int, default=QUICKSTART["batch_size"],
                        help="examples in one step")
    parser.add_argument("--steps", type=int, default=4, help="training steps that are timed")
    parser.add_argument("--tokens", type=int, default=64, help="in one reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the tables whose title contains this")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--verbose", action="store_true", help="show what the children print")
    parser.add_argument("--child", nargs=2, metavar=("TABLE", "ROW"), help=argparse.SUPPRESS)
    return parser


def main():
    """Read the command line, measure by turns, print the tables."""
    args = parser().parse_args()
    device, dtype = pick(args.device, args.dtype)
    if args.child:
        title, row = args.child
        print_result(run_row(title, int(row), args), peak_memory(device) or 0)
        return
    print(f"{machine(device, dtype)}, {args.weights} on {args.data}, {args.rounds} rounds")
    all_results = {}
    for title in ROWS:
        if args.only in title:
            rows = ["plain", *(f"+ {name}" for name in speed_ups_of(title, args))]

            def command_of(row, title=title, rows=rows):
                options = [*sys.argv[1:], "--child", title, str(rows.index(row))]
                return [sys.executable, __file__, *options]

            results = rounds_of_children(rows, args.rounds, command_of, args.verbose)
            print_table(title, results, "/ row before", ratios_to_the_row_before)
            all_results |= {f"{title}: {row}": pairs for row, pairs in results.items()}
    exit_if_incomplete(all_results, args.rounds)


if __name__ == "__main__":
    main()
