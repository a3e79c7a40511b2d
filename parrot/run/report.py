"""report.html: a run as a page, one file that needs no network and no script.

From run.json, metrics.jsonl, report.json (replies, an example), parrot.evaluate's evaluation.json.
"""

import json
import math
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template

from safetensors import SafetensorError

from parrot.system.console import UserError, printable
from parrot.system.disk import read_json, replace_text

PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def write(folder):
    """Write report.html into a run's folder. UserError names a file that is damaged."""
    replace_text(Path(folder, "report.html"), render(Path(folder)))


def render(folder):
    """The whole page, from the files of a run's folder."""
    about = read_json(folder / "run.json")
    with contents_of(folder / "metrics.jsonl") as path:
        metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        page = {key: chart(metrics, key, floor=0)
                for key in ("learning_rate", "tokens_per_second", "grad_norm")}
        page |= {"train_loss": chart(metrics, "train_loss", "val_loss"),
                 "progress": progress(metrics, about.get("steps"))}
    with contents_of(folder / "report.json") as path:
        shown = read_if_there(path)
        page |= {"replies": replies(shown.get("before", []), shown.get("after", [])),
                 "answer": answer(shown.get("answer", [])),
                 "example": example(shown.get("example", []))}
    with contents_of(folder / "evaluation.json") as path:
        page["evaluation"] = rows(read_if_there(path).get("table", []))
    with contents_of(folder / "run.json"):
        files = about["weights"]["files"] | about["data"]["files"]
        page |= {"hashes": rows([f"sha256 of {name}", files[name]] for name in files),
                 "told": text("; ".join(about["notes"])),
                 "out": text(about["config"]["out"])}
        return PAGE.substitute({name: text(value) for name, value in about.items()} | page)


def read_if_there(path):
    """The JSON object in a file; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def contents_of(path):
    """Whatever is wrong with the contents of this file becomes a UserError that names it."""
    try:
        yield path
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
            SafetensorError) as error:
        raise UserError(f"{path} is damaged, or not LittleParrot's: {error!r:.100}") from None


def text(value):
    """Any value as text for HTML: what comes from a file, a record or a name goes through it."""
    if isinstance(value, dict):  # 0 is a setting, None and False are not
        value = ", ".join(f"{name} {entry}" for name, entry in value.items()
                          if name != "files" and entry is not None and entry is not False)
    return escape(printable(str(value)))


def progress(metrics, steps):
    """How far the run is, and how well its model does."""
    done = len(points(metrics, "train_loss"))
    words = "finished" if done == steps else f"{done} of them done"
    losses = [loss for _, loss in points(metrics, "val_loss")]
    if len(losses) > 1:
        words += f"; held-out loss {losses[0]:.3f} before, {min(losses[1:]):.3f} at its best"
    return text(words)


def rows(table):
    """Lists of values as the rows of a table."""
    cells = ("".join(f"<td>{text(value)}</td>" for value in row) for row in table)
    return "".join(f"<tr>{row}</tr>" for row in cells)


def replies(before, after):
    """The same questions before and after training, side by side."""
    new = [reply for _, reply, _ in after] or ["not yet known"] * len(before)
    return "".join(
        f'<div class="card reply"><p>{text(question)}</p><p><small>before training</small><br>'
        f"{text(old)}</p><p><small>after training</small><br>{text(reply)}</p></div>"
        for (question, old, _), reply in zip(before, new, strict=True))


def answer(tokens):
    """A reply, each token coloured by its probability; pointing at one shows the alternatives."""
    spans = []
    for token in tokens:
        share, size = token["probability"], token["nucleus"]
        lines = [f"{share:.1%}; the nucleus of top-p {token['top_p']:g} holds {size} tokens"]
        lines += [f"{other:6.1%}  {word!r}" for word, other in token["likeliest"]]
        style, title = f"--p: {55 * share:.0f}%", text("\n".join(lines))
        spans.append(f'<span style="{style}" title="{title}">{text(token["text"])}</span>')
    return "".join(spans)


def example(spans):
    """One training example; what the model is trained to say is marked."""
    return "".join(f'<span class="{"learned" if is_target else ""}">{text(words)}</span>'
                   for words, is_target in spans)


def points(lines, key):
    """[(step, value)] of the lines that have a finite one."""
    return [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]


def ticks(low, high):
    """Round numbers between two bounds.

    >>> ticks(1.62, 2.41)
    [1.8, 2.0, 2.2, 2.4]
    """
    rough = (high - low) / 5 or abs(high) or 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999), rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def chart(metrics, key, dotted_key="", floor=math.inf):
    """Values over the steps as the inside of an SVG, a second series with dots; `floor` shows."""
    line, dots = points(metrics, key), points(metrics, dotted_key)
    if not line + dots:
        return ""
    steps, values = zip(*line, *dots, strict=True)
    left, right = min(steps), max(*steps, min(steps) + 1)
    low, high = min(floor, *values), max(values)
    high = high if high > low else low + (abs(low) or 1)

    def x(step):
        return f"{60 + 430 * (step - left) / (right - left):.1f}"

    def y(value):
        return f"{195 - 175 * (value - low) / (high - low):.1f}"
    parts = [f'<path d="M60 {y(tick)}H490"/><text class="tick" x="54" y="{y(tick)}">{tick:g}</text>'
             for tick in ticks(low, high)]
    parts += [f'<text x="{x(tick)}" y="212">{tick:g}</text>' for tick in ticks(left, right)]
    for name, series in {"one": line, "two": dots}.items():
        path = " ".join(f"{x(step)},{y(value)}" for step, value in series)
        parts += [f'<polyline class="{name}" points="{path}"/>'] if series else []
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}"><title>step {step}: {loss:.4f}</title>'
              "</circle>" for step, loss in dots]
    return "".join(parts)
