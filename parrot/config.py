"""Every setting in one place: a dataclass field is the option, its default and its help.

The command line is derived from the fields: `learning_rate: float = option(5e-5, "...")`
becomes `--learning-rate`, and a value out of its bounds is refused before anything loads.
"""

import argparse
import math
import typing
from dataclasses import dataclass, field, fields


def option(default, help, *, choices=None, may_change=False, **bounds):
    """A dataclass field that is also a command-line option; bounds: above, at_least, at_most.

    `may_change` marks what a resumed run may set differently, because it cannot change
    the result beyond rounding.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "may_change": may_change, "bounds": bounds})


DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("bfloat16", "float32")
REPETITION_PENALTY = 1.2  # the likeliest token of a small model leads into loops (see sampling.penalize)
WEIGHTS = "base | instruct | instruct-q4 | a model folder | a .gguf file | a Hub id"


# Few examples: with 64 a step there would be too few steps, and a third epoch, or a higher
# learning rate, only learned them by heart (held-out loss 2.32 instead of 2.13).
QUICKSTART = {"weights": "instruct-q4", "data": "quickstart", "out": "out/quickstart", "epochs": 2,
              "batch_size": 16, "learning_rate": 2e-4, "val_fraction": 0.1, "eval_every": 15}


@dataclass
class TrainConfig:
    quickstart: bool = option(False, "preset for a laptop's CPU, minutes: " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in QUICKSTART.items()))
    weights: str = option("base", f"what to start from: {WEIGHTS}")
    data: str = option("dolly", "what to train on: dolly | quickstart | a .jsonl, .json or "
                       ".parquet file | a Hub dataset id")
    out: str = option("out/littleparrot", "the run's folder", may_change=True)
    epochs: int = option(3, "times that every example is seen", at_least=1)
    max_steps: int | None = option(None, "stop after so many optimizer steps (and plan the "
                                   "learning rate for them)", at_least=1)
    batch_size: int = option(64, "examples in one optimizer step, at most", at_least=1)
    micro_batch_size: int | None = option(None, "examples in one forward; default: as many as "
                                          "fit --micro-batch-tokens", at_least=1, may_change=True)
    micro_batch_tokens: int | None = option(None, "token budget of one forward; default: 1536 on a "
                                            "CPU, with CUDA what its memory holds, at most 16384", at_least=1, may_change=True)
    max_length: int = option(2048, "longest example in tokens", at_least=8)
    learning_rate: float = option(5e-5, "peak learning rate; three epochs at 3e-4 learn Dolly by heart", above=0)
    min_learning_rate: float | None = option(None, "where the cosine ends; default: a tenth of "
                                             "the peak", at_least=0)
    warmup_ratio: float = option(0.1, "share of the steps that warm up", at_least=0, at_most=1)
    weight_decay: float = option(0.01, "AdamW's decay, on matrices only", at_least=0)
    beta1: float = option(0.9, "AdamW's beta1", at_least=0, at_most=0.9999)
    beta2: float = option(0.95, "AdamW's beta2", at_least=0, at_most=0.99999)
    grad_clip: float = option(1.0, "longest gradient; 0: no clipping", at_least=0)
    seed: int = option(0, "order of the examples", at_least=0)
    device: str = option("auto", "where to compute", choices=DEVICES, may_change=True)
    dtype: str = option("bfloat16", "type of the matrix products (autocast) and of the saved model, float32 on hardware without "
                        "bfloat16 units; the weights that are trained are float32", choices=DTYPES)
    compile: str = option("auto", "torch.compile what is not attention; auto: where it works and the run "
                          "is long enough to earn it back", choices=("auto", "on", "off"), may_change=True)
    eval_every: int = option(50, "steps between two held-out losses", at_least=1)
    save_every: int = option(50, "steps between two checkpoints", at_least=1, may_change=True)
    val_fraction: float = option(0.02, "share of the examples held out; 0: none, and the last "
                                 "model is kept", at_least=0, at_most=0.9)
    resume: bool = option(False, "go on with the unfinished run in --out", may_change=True)
    skip_bad_records: bool = option(False, "leave out records that cannot be read, and say so")

    def __post_init__(self):
        if self.min_learning_rate is None:
            self.min_learning_rate = self.learning_rate / 10

    def contradiction(self):
        """What in these settings does not fit together, or None."""
        if (self.micro_batch_size or 1) > self.batch_size:
            return (f"--micro-batch-size {self.micro_batch_size} is larger than "
                    f"--batch-size {self.batch_size}")
        if self.min_learning_rate > self.learning_rate:
            return (f"--min-learning-rate {self.min_learning_rate:g} is above "
                    f"--learning-rate {self.learning_rate:g}")
        if self.out.encode("utf-8", "ignore").decode() != self.out:
            return f"--out {self.out!a} is not UTF-8, which safetensors needs"
        if self.out in WEIGHTS.split(" | "):
            return f"--out {self.out} is the name of a model: choose another folder"
        return None


@dataclass
class SampleConfig:
    model: str | None = option(None, f"{WEIGHTS}; default: the newest of out/littleparrot and "
                               "out/quickstart")
    prompt: str | None = option(None, "what to ask; without it: a chat in the terminal")
    format: str = option("auto", "chat: in the model's chat template; plain: go on with the text; "
                         "auto: chat where the folder has a template", choices=("auto", "chat", "plain"))
    compare: list[str] | None = option(None, "the same prompt to several models, side by side")
    temperature: float = option(0.7, "below 1: surer, above: more varied; 0: always the likeliest "
                                "token, after the penalty (greedy)", at_least=0)
    top_p: float = option(0.9, "sample from the likeliest tokens that hold this much of the "
                          "probability", above=0, at_most=1)
    repetition_penalty: float = option(REPETITION_PENALTY, "above 1: what the reply has said becomes less likely", at_least=1)
    max_new_tokens: int = option(256, "longest reply in tokens", at_least=1)
    num_samples: int = option(1, "replies to the prompt", at_least=1)
    seed: int | None = option(None, "the same seed gives the same reply", at_least=0, at_most=2**63 - 1)
    device: str = option("auto", "where to compute", choices=DEVICES)
    dtype: str = option("bfloat16", "type of the weights", choices=DTYPES)

    def contradiction(self):
        """What in these settings does not fit together, or None."""
        if self.compare and self.model:
            return "--model and --compare: name all models after --compare"
        if self.prompt is None and (self.compare or self.num_samples > 1):
            return "--compare and --num-samples need a --prompt"
        if self.prompt is not None and not self.prompt.strip():
            return "--prompt is empty"
        return None


@dataclass
class EvaluateConfig:
    models: list[str] = option(None, WEIGHTS)
    data: str = option("dolly", "whose held-out part to use: what train.py's --data takes")
    val_fraction: float = option(0.02, "share of the data that is held out, as in training", above=0, at_most=1)
    max_length: int = option(2048, "longest example in tokens", at_least=8)
    max_prompts: int = option(64, "held-out prompts to answer (greedily, and sampled)", at_least=0)
    max_new_tokens: int = option(256, "longest reply in tokens", at_least=1)
    temperature: float = option(0.7, "of the sampled replies", above=0)
    top_p: float = option(0.9, "of the sampled replies", above=0, at_most=1)
    repetition_penalty: float = option(REPETITION_PENALTY, "of all replies; 1: none", at_least=1)
    batch_size: int = option(32, "replies written at once", at_least=1)
    seed: int = option(0, "of the sampled replies", at_least=0, at_most=2**63 - 1)
    device: str = option("auto", "where to compute", choices=DEVICES)
    dtype: str = option("bfloat16", "type of the weights", choices=DTYPES)
    skip_bad_records: bool = option(False, "leave out records that cannot be read")
    json: bool = option(False, "print all results as JSON instead of a table")


@dataclass
class BenchmarkConfig:
    weights: str = option("instruct-q4", WEIGHTS)
    data: str = option("quickstart", "what to train on: what train.py's --data takes")
    steps: int = option(3, "optimizer steps that are timed", at_least=1)
    batch_size: int = option(64, "examples in one optimizer step, at most", at_least=1)
    micro_batch_tokens: int | None = option(None, "token budget of one forward", at_least=1)
    max_length: int = option(2048, "longest example in tokens", at_least=8)
    compile: str = option("off", "whether training runs compiled code", choices=("on", "off"))
    device: str = option("auto", "where to compute", choices=DEVICES)
    dtype: str = option("bfloat16", "type of the matrix products", choices=DTYPES)
    json: bool = option(False, "print the figures as JSON, in SI units")


def parse(config_class, argv, description):
    """Build `config_class` from a command line. A wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for each in fields(config_class):
        _add_argument(parser, each)
    args = parser.parse_args(argv)
    if getattr(args, "quickstart", False):  # other defaults, which options beside it still override
        parser.set_defaults(**QUICKSTART)
        args = parser.parse_args(argv)
    config = config_class(**vars(args))
    if hasattr(config, "contradiction") and (fault := config.contradiction()):
        parser.error(fault)
    return config


def _add_argument(parser, each):
    flag, choices = "--" + each.name.replace("_", "-"), each.metadata["choices"]
    shown = "" if each.default is None or each.default is False else f" (default {each.default})"
    help = each.metadata["help"].replace("%", "%%") + shown
    if each.type is bool:
        parser.add_argument(flag, action="store_true", help=help)
    elif each.type == list[str]:  # has to be given, so it stands without a flag
        parser.add_argument(each.name, nargs="+", metavar="MODEL", help=help)
    elif each.type == list[str] | None:
        parser.add_argument(flag, nargs="+", metavar="NAME", help=help)
    else:
        kind = next((t for t in typing.get_args(each.type) if t is not type(None)), each.type)  # int of int | None
        parser.add_argument(flag, type=_bounded(kind, each.metadata["bounds"]), choices=choices, default=each.default,
                            metavar=None if choices else kind.__name__.upper(), help=help)


def _bounded(kind, bounds):
    """A converter for argparse that refuses what is out of bounds, NaN and infinity included."""
    def convert(text):
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        for name, bound in bounds.items():
            fits = {"above": value > bound,
                    "at_least": value >= bound, "at_most": value <= bound}[name]
            if not fits:
                raise argparse.ArgumentTypeError(f"{text} must be {name.replace('_', ' ')} {bound}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert
