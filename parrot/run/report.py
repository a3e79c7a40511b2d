"""report.html and README.md (the model card) of a run, made from the other files of its folder."""

import json
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jinja2
from safetensors import SafetensorError

from parrot.system.console import UserError, printable
from parrot.system.disk import read_json, replace_text

MARKUP = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ",
                        **{mark: "\\" + mark for mark in "\\`*_[]#!|~@:$"}})


def shown(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return "n/a" if value is None else printable(str(value))


def markdown(value):
    return shown(value).translate(MARKUP)


def template(name, **options):
    """A file beside this one; every value that it shows passes through `finalize`."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, **options).from_string(text)


PAGES = {"report.html": template("report.html", finalize=shown, autoescape=True),
         "README.md": template("card.md", finalize=markdown, keep_trailing_newline=True)}


def write(folder: Path):
    """Write both pages into a run's folder. UserError, and no change, if a file is damaged."""
    about = read_json(folder / "run.json")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    with blaming(folder):
        metrics = [json.loads(line) for line in lines]
        values = {"first_loss": None, "best_loss": None, "before": [], "after": [],
                  **about["config"], **about, "points": partial(points, metrics), "zip": zip,
                  "run_json": json.dumps(about, indent=2, ensure_ascii=False)}
        texts = {name: page.render(values) for name, page in PAGES.items()}
    for name, text in texts.items():
        replace_text(folder / name, text)


def points(metrics, *keys):
    """[(step, value)] of the lines that have a finite value under one of the keys."""
    return [(line["step"], line[key]) for key in keys for line in metrics
            if math.isfinite(line.get(key, math.nan))]


def read_if_there(path):  # {} where there is no such file
    return read_json(path) if path.is_file() else {}


@contextmanager
def blaming(path):
    """Whatever is wrong with what was read from this path becomes a UserError that names it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
            SafetensorError, jinja2.TemplateError) as error:
        raise UserError(f"{path} is damaged, or not LittleParrot's: {error!r:.100}") from None
