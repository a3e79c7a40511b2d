"""A command line from a dataclass: each field is an option, with default, help and bounds."""

import argparse
import math
import operator
import typing
from dataclasses import field, fields

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def option(default, help, *, choices=None, may_change=False, **bounds):
    """A dataclass field that is a command-line option, too. bounds: the keys of BOUNDS.

    may_change: it changes no result beyond rounding, so a resumed run may set it differently.
    """
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "may_change": may_change, "bounds": bounds})


def parse(config_class, argv, description):
    """Build `config_class` from a command line. A wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for setting in fields(config_class):
        flag, choices = "--" + setting.name.replace("_", "-"), setting.metadata["choices"]
        more = {"help": setting.metadata["help"].replace("%", "%%"), "default": setting.default}
        if setting.default is not None and setting.default is not False:
            more["help"] += f" (default {setting.default})"
        if setting.type is bool:
            parser.add_argument(flag, action="store_true", **more)
        elif setting.type == list[str]:  # required, so it stands without a flag
            parser.add_argument(setting.name, nargs="+", metavar="MODEL", **more)
        elif list[str] in typing.get_args(setting.type):
            parser.add_argument(flag, nargs="+", metavar="NAME", **more)
        else:
            kind = (typing.get_args(setting.type) or [setting.type])[0]  # int of int | None
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(flag, type=kind, choices=choices, metavar=metavar, **more)
    args = parser.parse_args(argv)
    if getattr(args, "quickstart", False):  # other defaults, which options beside it still override
        parser.set_defaults(**config_class.QUICKSTART)
        args = parser.parse_args(argv)
    for setting in fields(config_class):
        value, argument = getattr(args, setting.name), setting.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"argument --{argument}: {value} is not a finite number")
        for name, bound in setting.metadata["bounds"].items():
            if value is not None and not BOUNDS[name](value, bound):
                fault = f"{value:g} must be {name.replace('_', ' ')} {bound}"
                parser.error(f"argument --{argument}: {fault}")
    config = config_class(**vars(args))
    for fault, is_so in getattr(config, "contradictions", dict)().items():
        if is_so:
            parser.error(fault)
    return config
