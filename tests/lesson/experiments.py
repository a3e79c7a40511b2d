"""The experiments of parrot/README.md. Each changes one line in a copy of the repository.

    python tests/lesson/experiments.py                all of them: 15 CPU minutes
    python tests/lesson/experiments.py future stop    some of them
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ("--weights instruct-q4 --data quickstart --val-fraction 0.1 --batch-size 8 "
          "--max-steps 5 --learning-rate 2e-4 --eval-every 5")
FACTS = ("--weights instruct-q4 --data tests/lesson/facts.jsonl --val-fraction 0 --batch-size 1 "
         "--epochs 8 --learning-rate 1e-4")
REPLY = r'pieces += [("assistant\n", False), (text, True)'
CAPITAL, SWIM = "What is the capital of Canada?", "Who taught me to swim?"

# name: (options of train.py, (file, line, the line instead) or None)
# --plain where parrot/fast has its own form of the line, in training or in writing.
EXPERIMENTS = {
    "unchanged": (RECIPE, None),
    "future": (RECIPE + " --plain", (
        "parrot/attention.py",
        "    return torch.ones(n, n, dtype=torch.bool, device=device).tril()",
        "    return torch.ones(n, n, dtype=torch.bool, device=device)")),
    "shift": (RECIPE, (
        "parrot/data.py",
        "        arrays = (tokens, rows, tokens[rows + 1])",
        "        arrays = (tokens, rows, tokens[rows])")),
    "seams": (RECIPE + " --plain", (
        "parrot/attention.py",
        "        q, k, v = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v))  # (heads, n, D)",
        "        q, k, v = (x.transpose(0, 1).split(sum(self.lengths), dim=1) for x in (q, k, v))")),
    "positions": (RECIPE + " --plain", (
        "parrot/model.py",
        "        y = layout.attend(layer, rotate(q, *cos_sin), rotate(k, *cos_sin), v)  # (N, H, D)",
        "        y = layout.attend(layer, q, k, v)  # (N, H, D)")),
    "facts": (FACTS, None),
    "stop": (FACTS, (
        "parrot/chat.py",
        f"            {REPLY}, (IM_END, True)]",
        f"            {REPLY}, (IM_END, False)]")),
    "fast": (RECIPE.replace("2e-4", "5e-3"), None),
    "split": (RECIPE + " --micro-batch-size 1", None),
    "dice": (None, None),
    "zero_grad": (RECIPE, ("train.py", "        optimizer.zero_grad()", "        pass")),
}
DICE = ("--top-p 0.1", "--top-p 0.9", "--top-p 1", "--top-p 1 --temperature 2")


def edited(edit, folder):
    """A copy of the repository in `folder`, with one line replaced. ValueError: it is not there."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "out")
    copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=skipped))
    if edit:
        name, old, new = edit
        lines = (copy / name).read_text(encoding="utf-8").splitlines()
        if lines.count(old) != 1:
            raise ValueError(f"{name} has {lines.count(old)} lines {old.strip()!r}, not one")
        lines[lines.index(old)] = new
        (copy / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return copy


def python(copy, *arguments):
    """Run a command in the copy -> (stdout, stderr)."""
    done = subprocess.run([sys.executable, *arguments], cwd=copy, text=True, encoding="utf-8",
                          capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    if done.returncode:
        raise RuntimeError(f"{arguments} failed: {done.stderr}")
    return done.stdout.strip(), done.stderr


def ask(copy, model, prompt, options):
    """The replies of sample.py."""
    return python(copy, "sample.py", "--model", model, "--prompt", prompt, "--max-new-tokens", "24",
                  *options.split())[0]


@cache
def run(name):
    """Train as an experiment says -> {held_out, losses, norms, replies: what it was seen to do}."""
    options, edit = EXPERIMENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = edited(edit, folder)
        if name == "dice":
            asked = "--seed 0 --num-samples 2 "
            return {"replies": [ask(copy, "instruct-q4", "Name an animal that can talk.",
                                    asked + dice) for dice in DICE]}
        _, stderr = python(copy, "train.py", *options.split(), "--out", "out/run")
        steps = list(map(json.loads, (copy / "out/run/metrics.jsonl").read_text().splitlines()))
        capital = re.findall(re.escape(CAPITAL) + "  ->  (.*)", stderr)[-1]
        seen = {"held_out": [step["val_loss"] for step in steps if "val_loss" in step],
                "losses": [step["train_loss"] for step in steps if "train_loss" in step],
                "norms": [step["grad_norm"] for step in steps if "grad_norm" in step],
                "replies": [capital]}
        if "facts" in options:
            greedy = "--temperature 0 --repetition-penalty 1"
            seen["replies"].append(ask(copy, "out/run", SWIM, greedy))
        return seen


def near(ours, theirs, tolerance):
    """Whether two lists of numbers are equal but for a relative tolerance."""
    return all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs, strict=True))


def as_promised(name):
    """Whether an experiment shows what parrot/README.md says."""
    seen = run(name)
    replies = seen["replies"]
    if name == "dice":
        first, second = zip(*(reply.split("\n\n[2] ") for reply in replies), strict=True)
        return first[0][4:] == second[0] and first[1][4:] != second[1]
    if name in ("facts", "stop"):
        answer, stops = "Your aunt Zofia, in the quarry lake.", name == "facts"
        return replies[1].startswith(answer[:-1]) and (replies[1] == answer) == stops
    start, end = seen["held_out"]
    usual = 2.5 < start < 3.1  # what the model has before training
    return {
        "unchanged": lambda: usual and 0.2 < start - end < 0.6,
        "future": lambda: usual and end < 0.3 and CAPITAL in replies[0],
        "shift": lambda: start > 10 and 3 < end < 9,
        "seams": lambda: start > 4,
        "positions": lambda: start > 4,
        "fast": lambda: max(seen["losses"]) > 3 * seen["losses"][0] and end > start + 1,
        "split": lambda: near(seen["losses"] + seen["norms"],
                              run("unchanged")["losses"] + run("unchanged")["norms"], 1e-2),
        "zero_grad": lambda: near(seen["held_out"], run("unchanged")["held_out"], 1e-2),
    }[name]()


def row(name):
    """An experiment as a row of the table."""
    seen = run(name)
    held_out = " -> ".join(f"{loss:.3f}" for loss in seen.get("held_out", ()))
    losses = seen.get("losses", ())
    losses = f"{losses[0]:.2f} max {max(losses):.2f} -> {losses[-1]:.4f}" if losses else ""
    reply = " ".join(seen["replies"][-1].split())
    verdict = "as promised" if as_promised(name) else "NOT AS PROMISED"
    return f"{name:10} {verdict:16} {held_out:16} {losses:28} {reply:.80}"


def main():
    """Print a row for each experiment."""
    print(f"{'':10} {'':16} {'held-out loss':16} {'training loss':28} a reply")
    rows = []
    for name in sys.argv[1:] or EXPERIMENTS:
        rows.append(row(name))
        print(rows[-1], flush=True)
    sys.exit(any("NOT AS" in line for line in rows))


if __name__ == "__main__":
    main()
