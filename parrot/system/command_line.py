"""A command line from a dataclass: each field is an option, with default, help and bounds."""

import argparse
import math
import operator
import typing
from dataclasses import field, fields

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def option(default, help, *, choices=None, may_change=False, **bounds):
    """A dataclass field that is a command-line option, too; bounds: above, at_least, at_most.

    may_change: it changes no result beyond rounding, so a resumed run may set it differently.
    """
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "may_change": may_change, "bounds": bounds})


def parse(config_class, argv, description):
    """Build `config_class` from a command line. A wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for setting in fields(config_class):
        flag, choices = "--" + setting.name.replace("_", "-"), setting.metadata["choices"]
        help = setting.metadata["help"].replace("%", "%%")
        if setting.default is not None and setting.default is not False:
            help += f" (default {setting.default})"
        if setting.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
        elif setting.type == list[str]:  # has to be given, so it stands without a flag
            parser.add_argument(setting.name, nargs="+", metavar="MODEL", help=help)
        elif setting.type in (list[str] | None, list[str] | str):
            parser.add_argument(flag, nargs="+", metavar="NAME", help=help,
                                default=setting.default)
        else:
            kind = (typing.get_args(setting.type) or [setting.type])[0]  # int of int | None
            parser.add_argument(flag, type=_bounded(kind, setting.metadata["bounds"]), help=help,
                                choices=choices, default=setting.default,
                                metavar=None if choices else kind.__name__.upper())
    args = parser.parse_args(argv)
    if getattr(args, "quickstart", False):  # other defaults, which options beside it still override
        parser.set_defaults(**config_class.QUICKSTART)
        args = parser.parse_args(argv)
    config = config_class(**vars(args))
    for fault, is_so in getattr(config, "contradictions", dict)().items():
        if is_so:
            parser.error(fault)
    return config


def _bounded(kind, bounds):
    """A converter for argparse that refuses what is out of bounds, NaN and infinity included."""
    def convert(text):
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        for name, bound in bounds.items():
            if not BOUNDS[name](value, bound):
                raise argparse.ArgumentTypeError(f"{text} must be {name.replace('_', ' ')} {bound}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert
