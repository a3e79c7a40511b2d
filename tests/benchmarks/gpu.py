"""Everything that takes a GPU, in one call of at most ten minutes: checks first, then figures.

    python tests/benchmarks/gpu.py --weights FOLDER --data FILE

Written on a machine without one: what it prints there is not known yet. With --device cpu the
checks and a short run show that the script itself works.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from parrot import hub, sampling, varlen, weights  # noqa: E402
from parrot.attention import Ribbon  # noqa: E402
from parrot.benchmark import writing  # noqa: E402
from parrot.data import Batch, Examples, load_examples  # noqa: E402
from parrot.training import accumulate_gradients  # noqa: E402


def gradients(folder, examples, device, dtype):
    """The gradient of one ribbon by each parameter, and the loss."""
    model, _ = weights.load(folder, torch.float32, device)
    batch = Batch.of(examples, range(len(examples)), device)
    loss = accumulate_gradients(model, [batch], len(batch.targets), dtype)
    return loss, {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def check_gradients(folder, examples, device):
    """Each parameter's gradient on the device beside the CPU's in float32; whether it is near enough."""
    good = True
    torch.backends.cuda.matmul.allow_tf32 = False
    expected_loss, expected = gradients(folder, examples, torch.device("cpu"), torch.float32)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        loss, found = gradients(folder, examples, device, dtype)
        errors = {name: float((found[name] - e).norm() / e.norm()) for name, e in expected.items()}
        worst = max(errors, key=errors.get)
        good &= errors[worst] < allowed
        print(f"gradient, {dtype}: loss {loss:.5f} (CPU {expected_loss:.5f}), worst {worst} {errors[worst]:.1e}, "
              f"allowed {allowed:g}", flush=True)
    return good


def check_kernel(device):
    """The ribbon's kernel beside attention from document to document; whether they agree."""
    q, k, v = (torch.randn(700, heads, 64, device=device).bfloat16() for heads in (9, 3, 3))
    ribbon = Ribbon([5, 1, 600, 94], device)
    found, ribbon.seams = ribbon.attend(0, q, k, v), None
    error = float((found - ribbon.attend(0, q, k, v)).abs().max())
    print(f"varlen kernel here: {varlen.works_on(device)}, beside document by document: {error:.1e}", flush=True)
    return error < 3e-2


def check_replay(model):
    """Greedy replies with the captured graph beside those without; whether they are the same."""
    def replies():
        return list(sampling.generate(model, [[5, 6, 7], [8, 9, 10, 11]], set(), max_new_tokens=30, temperature=0, top_p=1))
    replayed, usual = replies(), sampling.CapturedStep
    sampling.CapturedStep = lambda model, cache: lambda tokens: sampling.logits_after(model, cache, tokens)
    same, sampling.CapturedStep = replayed == replies(), usual
    print(f"replayed replies are the same: {same}", flush=True)
    return same


def train(args, *options):
    """One run of train.py; prints its seconds without evaluation, its share of the limit, its held-out losses."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / "train.py"), "--weights", str(args.weights), "--data", args.data, "--device", args.device,
                   "--eval-every", "100000", "--save-every", "100000", "--out", f"{folder}/run", *options]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    steps, checks = ([line for line in lines if key in line] for key in ("train_loss", "val_loss"))
    share = sorted(line["share_of_limit"] for line in steps)[len(steps) // 2]
    print(f"train.py {' '.join(options)}: {len(steps)} steps, {steps[-1]['seconds'] - checks[0]['seconds']:.1f} s of training, "
          f"{time.perf_counter() - started:.0f} s in all, {share:.0%} of the limit, held-out loss "
          f"{checks[0]['val_loss']:.4f} -> {checks[-1]['val_loss']:.4f}", flush=True)


def main():
    """Read the command line; check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="instruct-q4")
    parser.add_argument("--data", default="dolly")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.weights, device = hub.find_weights(args.weights).path.resolve(), torch.device(args.device)
    args.data = str(hub.find_data(args.data).path.resolve())
    on_gpu = device.type == "cuda"
    print(torch.cuda.get_device_name() if on_gpu else "CPU", torch.__version__, flush=True)
    model, tokenizer = weights.load(args.weights, torch.bfloat16, device)
    examples, _, _ = load_examples(args.data, tokenizer, 2048, 0.02)
    good = [check_gradients(args.weights, Examples.of([examples[i] for i in range(4)]), device), check_kernel(device),
            check_replay(model)]
    for samples in (1, 16, 256) if on_gpu else (1,):
        print(f"{samples} replies at once: {writing(model, samples, 200):.0f} tokens/s", flush=True)
    del model
    if not on_gpu:
        train(args, "--max-steps", "1", "--batch-size", "4", "--val-fraction", "0.001")
        sys.exit(not all(good))
    subprocess.run([sys.executable, "-m", "parrot.benchmark", "--weights", str(args.weights), "--data", args.data, "--steps", "10",
                    "--compile", "on"], cwd=ROOT)
    for rate in ("5e-5", "1e-4", "3e-4"):  # three epochs each, which also chooses the learning rate
        train(args, "--compile", "on", "--learning-rate", rate)
    train(args, "--compile", "on", "--weight-decay", "0.1")
    if importlib.util.find_spec("trl"):
        subprocess.run([sys.executable, str(ROOT / "tests" / "benchmarks" / "compare.py"), "--data", args.data, "--only", "training",
                        "--rounds", "1", "--steps", "20"], cwd=ROOT)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
