"""A command line from a dataclass: each field is an option, with default, help and bounds."""

import argparse
from dataclasses import field, fields
from operator import ge, gt, le, lt
from typing import get_args

BOUNDS = {"above": gt, "at_least": ge, "at_most": le, "below": lt}


def option(default, help, *, choices=None, may_change=False, **bounds):
    """A dataclass field that is a command-line option, too. bounds: {key of BOUNDS: a number}."""
    # may_change: it changes no result beyond rounding, so a resumed run may set it differently.
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "may_change": may_change, "bounds": bounds})


def parse(config_class, argv, description):
    """Build `config_class` from a command line. A wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for setting in fields(config_class):
        flag, choices = "--" + setting.name.replace("_", "-"), setting.metadata["choices"]
        kind = (get_args(setting.type) or [setting.type])[0]  # int of int | None, str of list[str]
        more = {"help": setting.metadata["help"].replace("%", "%%"), "default": setting.default}
        if setting.default is not None and setting.default is not False:
            more["help"] += f" (default {setting.default})"
        if kind is bool:
            more["action"] = "store_true"
        elif kind == list[str]:
            more["nargs"] = "+"
        elif setting.type == list[str]:  # required, so it stands without a flag
            flag = setting.name
            more |= {"nargs": "+", "metavar": flag.rstrip("s").upper()}
        else:
            metavar = None if choices else kind.__name__.upper()
            more |= {"type": kind, "choices": choices, "metavar": metavar}
        parser.add_argument(flag, **more)
        if "nargs" in more and sum(word.partition("=")[0] == flag for word in argv) > 1:
            parser.error(f"argument {flag}: name all values after one {flag}")
    args = parser.parse_args(argv)
    if getattr(args, "quickstart", False):  # other defaults, which options beside it still override
        args = parser.parse_args(argv, argparse.Namespace(**config_class.QUICKSTART))
    for setting in fields(config_class):
        value = getattr(args, setting.name)
        for name, bound in {**setting.metadata["bounds"], "below": float("inf")}.items():
            if isinstance(value, (int, float)) and not BOUNDS[name](value, bound):
                parser.error(f"argument --{setting.name.replace('_', '-')}: {value} must be "
                             f"{name.replace('_', ' ')} {bound}")
    config = config_class(**vars(args))
    for fault, is_so in getattr(config, "contradictions", dict)().items():
        if is_so:
            parser.error(fault)
    return config
