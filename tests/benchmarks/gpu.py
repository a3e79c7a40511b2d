"""Everything that takes a GPU, in one call of at most ten minutes: checks first, then figures.

    python tests/benchmarks/gpu.py --weights FOLDER --data FILE

What matters most comes first, and what no longer fits into --minutes is named as left out. With
--device cpu the checks and a short run show that the script itself works. Exit status 1 where a
check or a part fails.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed import machine, write

from parrot import assistant, fast, sampling
from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.data import Batch, Examples, load_examples
from parrot.fast.captured import CapturedForward
from parrot.files import hub
from parrot.system.console import run_program
from parrot.system.device import multiplies_bfloat16
from parrot.training import loss_sum

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
CPU = torch.device("cpu")
FLOAT32 = 1e-2  # allowed; on a CPU up to 1.7e-3 from float64, on an H200 2.6e-3 from the CPU
NO_UNITS = 0.15  # allowed where the CPU cannot say what bfloat16's error is; healthy: 0.03 to 0.1


# ---- checks: each prints what it saw and returns whether it is good

def gradients(folder, examples, device, dtype):
    """The mean loss of one ribbon, and its gradient by each parameter, on the CPU in float32.

    On a GPU in 16 bits by fast/captured.py, as train.py does it.
    """
    model, _ = assistant.load_parts(folder, torch.float32, device)
    if device.type == "cuda" and dtype != torch.float32:
        model.forward = CapturedForward(model, examples.longest)
    batch = Batch.of(examples, range(len(examples)), device)
    loss = loss_sum(model, batch, dtype) / len(batch.targets)
    loss.backward()
    return loss.item(), {name: parameter.grad.float().cpu()
                         for name, parameter in model.named_parameters()}


def worst_error(result, expected):
    """The largest relative error of a parameter's gradient, and the parameter's name."""
    errors = {name: float((result[name] - gradient).norm() / gradient.norm())
              for name, gradient in expected.items()}
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def check_gradients(folder, examples, device):
    """The device's gradients beside the CPU's, which are float32.

    bfloat16 has an error of its own. Allowed is one and a half times the error that the CPU's
    bfloat16 has on the same examples.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    expected_loss, expected = gradients(folder, examples, CPU, torch.float32)
    allowed = {torch.float32: FLOAT32, torch.bfloat16: NO_UNITS}
    if multiplies_bfloat16(CPU):
        _, cpu_bfloat16 = gradients(folder, examples, CPU, torch.bfloat16)
        allowed[torch.bfloat16] = 1.5 * worst_error(cpu_bfloat16, expected)[0]
    good = True
    for dtype, limit in allowed.items():
        if device.type == "cpu" and not multiplies_bfloat16(CPU) and dtype == torch.bfloat16:
            continue  # it would take minutes
        loss, result = gradients(folder, examples, device, dtype)
        error, name = worst_error(result, expected)
        good &= error < limit
        print(f"gradient, {dtype}: loss {loss:.5f} (CPU {expected_loss:.5f}), worst {name} "
              f"{error:.1e}, allowed {limit:.1e}", flush=True)
    return good


def check_attention(device):
    """The ribbon's fast attention in bfloat16 beside the formula in float32."""
    q, k, v = (torch.randn(700, heads, 64, device=device) for heads in (9, 3, 3))
    lengths = [5, 1, 600, 94]
    ribbon = Ribbon(lengths, device)
    result = ribbon.attend(0, q.bfloat16(), k.bfloat16(), v.bfloat16())
    with mock.patch.object(fast, "enabled", False):
        expected = Ribbon(lengths, device).attend(0, q, k, v)
    error = float((result - expected).abs().max())
    print(f"attention, bfloat16 beside the formula in float32: {error:.1e} (varlen kernel: "
          f"{ribbon.fast.seams is not None})", flush=True)
    return error < 5e-2


def check_packed(folder, packed, tokens, device):
    """Logits of fast/packed.py, which writes, beside the model's: no further from float32."""
    def logits(model):
        with torch.inference_mode():
            ribbon = Ribbon([len(tokens)], model.device)
            return model.logits(model(tokens.to(model.device), ribbon)).float().cpu()
    plain, exact = (assistant.load_parts(folder, dtype, place)[0]
                    for dtype, place in ((packed.dtype, device), (torch.float32, CPU)))
    exact = logits(exact)
    errors = [float((logits(model) - exact).norm() / exact.norm()) for model in (packed, plain)]
    print(f"logits, {packed.dtype}: error packed {errors[0]:.1e}, plain {errors[1]:.1e}", flush=True)
    return errors[0] < 1.5 * errors[1] + 1e-6


def check_replay(model):
    """Greedy replies from the captured graph beside those of single steps."""
    def replies():
        return sampling.generate(model, [[5, 6, 7], [8, 9, 10, 11]], set(), top_p=1,
                                 max_new_tokens=30, temperature=0)
    replayed = replies()
    with mock.patch.object(sampling, "CapturedStep", lambda model, cache: sampling.logits_after):
        is_same = replayed == replies()
    print(f"replies of the captured graph are the same: {is_same}", flush=True)
    return is_same


def check_all(folder, data, device):
    """All checks, and the speed of writing."""
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    writer = Assistant.load("", folder, dtype, device)
    model, tokenizer = writer.model, writer.tokenizer
    examples, _, _ = load_examples(hub.find_data(data), tokenizer, 2048, 0.02)
    few = Examples.of([examples[index] for index in range(4)])
    good = [check_gradients(folder, few, device), check_attention(device),
            check_packed(folder, model, torch.from_numpy(few[0][0].astype(int)), device),
            check_replay(model)]
    for samples in (1, 16, 256) if device.type == "cuda" else (1,):
        rate = write(writer, samples, 200 if device.type == "cuda" else 8)
        print(f"{samples} replies at once: {rate:.0f} tokens/s", flush=True)
    return all(good)


# ---- figures: each part is a process of its own, within the time that is left

def train(args, seconds_left, *options):
    """One run of train.py; prints its time, speed, memory and held-out losses."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        out = Path(folder, "run")
        command = [sys.executable, str(ROOT / "train.py"), "--weights", str(args.weights),
                   "--data", args.data, "--device", args.device, "--eval-every", "100000",
                   "--save-every", "100000", "--out", str(out), *options]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds_left)
        if done.returncode:
            print(done.stderr[-2000:])
        done.check_returncode()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        peak = json.loads((out / "run.json").read_text())["peak_memory"]
    steps = [line for line in lines if "train_loss" in line]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    rate = statistics.median(line["tokens_per_second"] for line in steps)
    training = sum((now["tokens"] - before["tokens"]) / now["tokens_per_second"]
                   for before, now in zip([{"tokens": 0}, *steps], steps, strict=False))
    print(f"train.py {' '.join(options)}: {len(steps)} steps, {training:.1f} s of training, "
          f"{time.perf_counter() - started:.0f} s in all, {rate:.0f} tokens/s (median), "
          f"{peak / 1e9:.1f} GB, held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)


def script(seconds_left, name, *options):
    """Run another script of this folder."""
    command = [sys.executable, str(BENCHMARKS / name), *options]
    subprocess.run(command, timeout=seconds_left, check=True)


def parts_of(args):
    """(name, function of the seconds left) of all parts, what matters most first."""
    def run(*options):
        return lambda seconds: train(args, seconds, *options)

    def other(name, *options):
        return lambda seconds: script(seconds, name, "--data", args.data, *options)

    if args.device == "cpu":
        few = ("--max-steps", "1", "--batch-size", "4", "--val-fraction", "0.001")
        return [("a short run", run(*few))]
    weights = ("--weights", str(args.weights))
    parts = [
        ("the default recipe", run("--compile", "on")),
        ("the same, not compiled", run("--compile", "off")),
        ("speed.py", other("speed.py", *weights, "--steps", "10", "--compile", "on")),
        ("the speed-ups", other("tricks.py", *weights, "--rounds", "1", "--batch-size", "64",
                                "--steps", "5")),
        ("--learning-rate 1e-4", run("--compile", "on", "--learning-rate", "1e-4")),
        ("--learning-rate 3e-4", run("--compile", "on", "--learning-rate", "3e-4")),
        ("--weight-decay 0.1", run("--compile", "on", "--weight-decay", "0.1"))]
    if importlib.util.find_spec("trl"):
        peers = other("compare.py", "--only", "training", "--rounds", "1", "--steps", "20")
        parts.insert(3, ("TRL", peers))
    return parts


def outcome_of(part, seconds):
    """Run a part; "" or what went wrong."""
    if seconds < 10:
        return "left out, no time"
    try:
        part(seconds)
    except subprocess.TimeoutExpired:
        return "cut off, no time"
    except subprocess.CalledProcessError as error:
        return f"failed with status {error.returncode}"
    return ""


def main():
    """Read the command line; check, then measure until the time is up."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="instruct-q4", help="what train.py's --weights takes")
    parser.add_argument("--data", default="dolly", help="what train.py's --data takes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    args = parser.parse_args()
    args.weights = hub.find_weights(args.weights).path.resolve()
    args.data = str(hub.find_data(args.data).files[0].resolve())
    device = torch.device(args.device)
    print(machine(device, torch.bfloat16), flush=True)
    is_good = check_all(args.weights, args.data, device)
    for name, part in parts_of(args):
        seconds_left = 60 * args.minutes - (time.perf_counter() - started)
        outcome = outcome_of(part, seconds_left)
        is_good &= not outcome.startswith("failed")
        if outcome:
            print(f"{name}: {outcome}", flush=True)
    sys.exit(not is_good)


if __name__ == "__main__":
    run_program(main)
