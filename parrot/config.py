"""Every setting: a dataclass field is the option, its default and its help.

`learning_rate: float = option(5e-5, "...")` becomes `--learning-rate` (system/command_line.py).
"""

from dataclasses import dataclass

from parrot.system.command_line import option

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("bfloat16", "float16", "float32")
REPETITION_PENALTY = 1.2  # see sampling.penalize
WEIGHTS = "base | instruct | instruct-q4 | a model folder | a .gguf file | a Hub id"
DATA = "dolly | quickstart | .jsonl, .json, .csv, .parquet files or a folder | a Hub id, or id:test"

QUICKSTART = {"weights": "instruct-q4", "data": "quickstart", "out": "out/quickstart",
              "epochs": 1, "batch_size": 8, "learning_rate": 2e-4, "val_fraction": 0.1}


@dataclass
class Machine:
    device: str = option("auto", "where to compute", choices=DEVICES, may_change=True)
    dtype: str = option("bfloat16", "type of matrix products, if the device has it", choices=DTYPES)
    plain: bool = option(False, "without parrot/fast, the same but for rounding", may_change=True)


@dataclass
class Recipe(Machine):  # of train.py and parrot.dpo
    weights: str = option("base", f"what to start from: {WEIGHTS}")
    data: list[str] | str = option("dolly", f"what to train on: {DATA}")
    val_data: str | None = option(None, "held-out data: a split of --data, or what --data takes")
    max_examples: int | None = option(None, "use only the first N examples of --data", at_least=1)
    out: str = option("out/littleparrot", "the run's folder", may_change=True)
    epochs: int = option(3, "how often every example is seen", at_least=1, at_most=10**9)
    max_steps: int | None = option(None, "steps after which run and schedule end", at_least=1)
    batch_size: int = option(64, "examples in one step, at most", at_least=1, at_most=10**9)
    micro_batch_size: int | None = option(None, "examples per forward", at_least=1, may_change=True)
    micro_batch_tokens: int | None = option(None, "tokens per forward", at_least=1, may_change=True)
    max_length: int = option(2048, "longer examples (in tokens) are left out", at_least=8)
    learning_rate: float = option(5e-5, "the peak; at 3e-4 three epochs memorise Dolly", above=0)
    min_learning_rate: float | None = option(None, "at the end; default: peak / 10", at_least=0)
    warmup_ratio: float = option(0.1, "share of the steps that warm up", at_least=0, at_most=1)
    weight_decay: float = option(0.01, "AdamW's decay, on matrices only", at_least=0)
    beta1: float = option(0.9, "AdamW's beta1", at_least=0, at_most=0.9999)
    beta2: float = option(0.95, "AdamW's beta2", at_least=0, at_most=0.99999)
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", at_least=0)
    seed: int = option(0, "order of the examples", at_least=0, at_most=2**63 - 1)
    compile: str = option("auto", "torch.compile the blocks; auto: if it works, in long runs",
                          choices=("auto", "on", "off"), may_change=True)
    eval_every: int = option(50, "steps between two held-out losses", at_least=1)
    save_every: int = option(50, "steps between two checkpoints", at_least=1, may_change=True)
    val_fraction: float = option(0.02, "share of the examples held out", at_least=0, at_most=0.9)
    resume: bool = option(False, "continue the unfinished run in --out", may_change=True)
    keep: str = option("yes", "no: save no weights", choices=("yes", "no"), may_change=True)
    ask: list[str] | None = option(None, "questions to ask before and after", may_change=True)
    dry_run: bool = option(False, "forecast time and memory, and stop", may_change=True)
    skip_bad_records: bool = option(False, "leave out records that cannot be read, and say so")

    def __post_init__(self):
        if self.min_learning_rate is None:
            self.min_learning_rate = self.learning_rate / 10

    def contradictions(self):  # {what does not fit together: whether it is so}
        return {
            f"--min-learning-rate {self.min_learning_rate:g} is above --learning-rate "
            f"{self.learning_rate:g}": self.min_learning_rate > self.learning_rate,
            "--plain compiles nothing: omit --compile on": self.plain and self.compile == "on",
            "--resume and --keep no: the run would be lost": self.resume and self.keep == "no",
            f"--out {self.out!a} is not UTF-8, which safetensors needs":
                self.out.encode("utf-8", "ignore").decode() != self.out,
            f"--out {self.out} is the name of a model": self.out in WEIGHTS.split(" | ")}


@dataclass
class TrainConfig(Recipe):
    quickstart: bool = option(False, f"preset for a laptop's CPU, minutes: {QUICKSTART}")
    QUICKSTART = QUICKSTART  # for system/command_line.py


@dataclass
class Writing(Machine):
    temperature: float = option(0.7, "0: greedy; above 1: more varied", at_least=0)
    top_p: float = option(0.9, "keep the likeliest tokens that hold this much", above=0, at_most=1)
    repetition_penalty: float = option(REPETITION_PENALTY, "above 1: less repetition", at_least=1)
    max_new_tokens: int = option(256, "longest reply in tokens", at_least=1)


@dataclass
class SampleConfig(Writing):
    model: str | None = option(None, f"{WEIGHTS}; default: what was trained last")
    prompt: str | None = option(None, "what to ask; without it: a chat in the terminal")
    system: str | None = option(None, "the system turn; '': none, not even the template's own")
    format: str = option("auto", "plain: continue the text", choices=("auto", "chat", "plain"))
    compare: list[str] | None = option(None, "the same prompt to several models, side by side")
    num_samples: int = option(1, "replies to the prompt", at_least=1, at_most=10**5)
    seed: int | None = option(None, "same seed, same reply", at_least=0, at_most=2**63 - 1)

    def contradictions(self):
        return {
            "--model and --compare: name all models after --compare": self.compare and self.model,
            "--compare and --num-samples need a --prompt":
                self.prompt is None and (self.compare or self.num_samples > 1),
            "--prompt is empty": self.prompt is not None and not self.prompt.strip()}


@dataclass
class EvaluateConfig(Writing):
    models: list[str] = option(None, WEIGHTS)
    data: str = option("dolly", f"whose held-out part to use: {DATA}")
    val_fraction: float = option(0.02, "share held out, as in training", above=0, at_most=1)
    max_length: int = option(2048, "longer examples (in tokens) are left out", at_least=8)
    max_prompts: int = option(64, "held-out prompts to answer, greedily and sampled", at_least=0)
    batch_size: int = option(32, "replies written at once", at_least=1)
    seed: int = option(0, "seed of the sampled replies", at_least=0, at_most=2**63 - 1)
    skip_bad_records: bool = option(False, "leave out records that cannot be read")
    json: bool = option(False, "print all results as JSON instead of a table")
