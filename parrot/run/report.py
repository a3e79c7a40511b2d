"""report.html and README.md (the model card) of a run, made from the other files of its folder."""

import json
import math
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template

from safetensors import SafetensorError

from parrot.system.console import UserError, printable
from parrot.system.disk import read_json, replace_text

REPORT = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
CARD = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
MARKUP = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ",
                        **{mark: "\\" + mark for mark in "\\`*_[]#!|~@:$"}})


def write(folder: Path):
    """Write both pages into a run's folder. UserError, and no change, if a file is damaged."""
    about = read_json(folder / "run.json")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    with contents_of(folder):
        metrics = [json.loads(line) for line in lines]
        after = dict(about.pop("after", []))  # a resumed run may --ask others
        replies = ""
        for question, reply in about.pop("before", []):
            cells = map(html, (question, reply, after.get(question, "not yet known")))
            replies += f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"
        values = {"first_loss": None, "best_loss": None, **about["config"], **about,
                  "done": len(points(metrics, "train_loss"))}
        for name in ("weights", "data"):
            values[name] = f"{about[name]['name']} ({about[name]['from']})"
        report = REPORT.substitute(
            {name: html(value) for name, value in values.items()},
            losses=chart(metrics, "train_loss", "val_loss"), rates=chart(metrics, "learning_rate"),
            speeds=chart(metrics, "tokens_per_second"), norms=chart(metrics, "grad_norm"),
            margins=chart(metrics, "val_margin"), accuracies=chart(metrics, "val_accuracy"),
            replies=replies, run_json=html(json.dumps(about, indent=2, ensure_ascii=False)))
        card = CARD.substitute({name: markdown(value) for name, value in values.items()})
    replace_text(folder / "report.html", report)
    replace_text(folder / "README.md", card)


def read_if_there(path):
    """The JSON object in a file; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def contents_of(path):
    """Whatever is wrong with what was read from this path becomes a UserError that names it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
            SafetensorError) as error:
        raise UserError(f"{path} is damaged, or not LittleParrot's: {error!r:.100}") from None


def plain(value):
    if value is None:
        return "n/a"
    return printable(f"{value:.5g}" if isinstance(value, float) else str(value))


def html(value):
    """Any value without HTML's markup: nothing reaches the page but through here."""
    return escape(plain(value))


def markdown(value):
    return plain(value).translate(MARKUP)


def points(lines, key):
    """[(step, value)] of the lines that have a finite one."""
    return [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]


def chart(metrics, *keys):
    """A curve for each key, as the inside of an SVG; the axes name their two ends."""
    curves = [points(metrics, key) for key in keys]
    if not any(curves):
        return ""
    steps, values = zip(*(point for curve in curves for point in curve), strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    parts = ['<path d="M60 20V195H490"/>']
    for curve in curves:
        pixels = [f"{60 + 430 * (step - left) / (right - left or 1):.1f},"
                  f"{195 - 175 * (value - low) / (high - low or 1):.1f}" for step, value in curve]
        parts.append(f'<polyline points="{" ".join(pixels)}"/>')
    for x, y, label in ((60, 212, left), (490, 212, right), (30, 195, low), (30, 20, high)):
        parts.append(f'<text x="{x}" y="{y}">{label:.4g}</text>')
    return "".join(parts)
