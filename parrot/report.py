"""report.html: a run as a picture, one file that needs no network and no script.

Made from what lies in the run's folder, and rewritten as the run goes: run.json (what was
trained on what), metrics.jsonl (the curves), report.json (an example, replies), and
evaluation.json where `python -m parrot.evaluate` was run on the folder.
"""

import json
import math
from html import escape
from pathlib import Path

from parrot.console import printable
from parrot.files import read_json, replace_text

STYLE = """
:root { --page: #fcfcfa; --ink: #1d2126; --soft: #666e78; --line: #d9dcd6; --one: #2a6fb0; --two: #c8501e; --mark: #cdeccf;
        --card: #ffffff }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e7ea; --soft: #98a1ab; --line: #343a41;
        --one: #6cb2f2; --two: #f2935c; --mark: #1e4a2a; --card: #1b1f23 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .4rem 0 } .soft { color: var(--soft) } small { color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1.5rem;
        margin-bottom: .6rem; white-space: pre-line } .asked { grid-column: 1 / -1; font-weight: 600 }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td.name { color: var(--soft); white-space: nowrap }
.tokens { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .88rem; line-height: 1.7 }
.tokens span { border-radius: .2rem } .learned { background: var(--mark) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.axis { stroke: var(--line) } .one { stroke: var(--one); fill: none } .two { stroke: var(--two); fill: none }
.dot { fill: var(--two) } .bar { fill: var(--one) } .key-one { color: var(--one) } .key-two { color: var(--two) }
"""


def write(folder):
    """Write report.html into a run's folder from what lies there. OSError where the disk refuses."""
    folder = Path(folder)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shown, evaluation = (read_json(folder / name) if (folder / name).is_file() else {}
                         for name in ("report.json", "evaluation.json"))
    page = render(read_json(folder / "run.json"), [json.loads(line) for line in lines], shown, evaluation)
    replace_text(folder / "report.html", page)


def text(value):
    """Any value as text that HTML and a reader can bear."""
    return escape(printable(str(value)))


def render(about, metrics, shown, evaluation):
    """The whole page, from the four files' contents."""
    steps = [line for line in metrics if "train_loss" in line]
    checks = [line for line in metrics if "val_loss" in line]
    done = steps[-1]["step"] if steps else 0
    state = "finished" if done == about["steps"] else f"{done} of them done"
    best = min((line["val_loss"] for line in checks if line["step"]), default=None)
    summary = f"{about['steps']} steps on {about['examples']} examples; {state}"
    if best is not None:
        summary += f"; held-out loss {checks[0]['val_loss']:.3f} before, {best:.3f} at its best"
    curves = [
        chart("Loss in nats a token", [("one", points(steps, "train_loss")), ("two", points(checks, "val_loss"))],
              'training <span class="key-one">━</span>, held-out <span class="key-two">●━</span>'),
        chart("Learning rate", [("one", points(steps, "learning_rate"))]),
        chart("Tokens a second", [("one", points(steps, "tokens_per_second"))], zero=True),
        chart("Share of what a large matrix product reaches here", [("one", points(steps, "share_of_limit"))], zero=True),
        chart("Length of the gradient", [("one", points(steps, "grad_norm"))], zero=True)]
    body = [f"<h1>{text(about['config']['out'])}</h1><p class=soft>{text(summary)}</p>",
            '<h2>How it learned</h2><div class="grid">', *curves, "</div>",
            replies(shown), answer(shown.get("answer", [])), example(shown.get("example", [])),
            evaluated(evaluation), data(about), provenance(about)]
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width, "
            f"initial-scale=1'><title>{text(about['config']['out'])}</title><style>{STYLE}</style>{''.join(body)}</html>\n")


# ---- pictures

def points(lines, key):
    """[(step, value)] of the lines that have a finite one."""
    return [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]


def ticks(low, high, count=4):
    """Round numbers between two bounds.

    >>> ticks(1.62, 2.41)
    [1.8, 2.0, 2.2, 2.4]
    """
    rough = (high - low) / count or abs(high) or 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def chart(title, series, key="", zero=False):
    """Lines over the steps as an SVG; the second series, few points, with dots."""
    every = [point for _, line in series for point in line]
    if not every:
        return ""
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*every))
    low = 0 if zero else low
    right, high = max(right, left + 1), high if high > low else low + (abs(low) or 1)

    def x(step):
        return f"{60 + 430 * (step - left) / (right - left):.1f}"

    def y(value):
        return f"{195 - 175 * (value - low) / (high - low):.1f}"
    parts = [f'<path class="axis" d="M60 {y(tick)}H490"/><text x="54" y="{y(tick)}" dy="4" text-anchor="end">{tick:g}</text>'
             for tick in ticks(low, high)]
    parts += [f'<text x="{x(tick)}" y="212" text-anchor="middle">{tick:g}</text>' for tick in ticks(left, right, 5)]
    for name, line in series:
        path = " ".join(f"{x(step)},{y(value)}" for step, value in line)
        parts.append(f'<polyline class="{name}" stroke-width="1.6" points="{path}"/>')
        if name == "two":
            parts += [f'<circle class="dot" r="3.2" cx="{x(step)}" cy="{y(value)}"><title>step {step}: {value:.4f}</title></circle>'
                      for step, value in line]
    return (f'<div class="card"><p>{title} <small>{key}</small></p><svg viewBox="0 0 508 232" role="img">'
            f'{"".join(parts)}<text x="270" y="229" text-anchor="middle">step</text></svg></div>')


def length_histogram(lengths):
    """How many examples have up to 64 tokens, up to 128, ...

    >>> length_histogram([3, 64, 65, 1000])
    {'up to 64': 2, '128': 1, '256': 0, '512': 0, '1024': 1}
    """
    bounds = [64 * 2 ** i for i in range(1 + max(0, math.ceil(math.log2(max(lengths) / 64))))]
    found = [sum(low < n <= high for n in lengths) for low, high in zip([0, *bounds], bounds)]
    return dict(zip([f"up to {bounds[0]}", *map(str, bounds[1:])], found))


def bars(title, counts):
    """{label: count} as horizontal bars."""
    most = max(counts.values())
    rows = []
    for i, (label, count) in enumerate(counts.items()):
        y, width = 20 * i, 270 * count / most
        rows.append(f'<text x="150" y="{y + 14}" text-anchor="end">{text(label)}</text><rect class="bar" x="158" y="{y + 3}" '
                    f'height="14" width="{width:.1f}"/><text x="{164 + width:.1f}" y="{y + 14}">{count}</text>')
    return f'<div class="card"><p>{title}</p><svg viewBox="0 0 500 {20 * len(rows) + 4}" role="img">{"".join(rows)}</svg></div>'


# ---- words

def table(head, rows):
    """Cells of text as a table."""
    top = f"<tr>{''.join(f'<th>{text(cell)}</th>' for cell in head)}</tr>" if head else ""
    return (f'<div class="wide"><table>{top}'
            + "".join("<tr>" + "".join(f"<td{' class=name' if not i else ''}>{text(cell)}</td>" for i, cell in enumerate(row))
                      + "</tr>" for row in rows) + "</table></div>")


def replies(shown):
    """The same questions before and after training, side by side."""
    before, after = shown.get("before", []), shown.get("after", [])
    cards = [f'<div class="card said"><p class=asked>{text(question)}</p><p><small>before training</small><br>{text(reply)}</p>'
             f'<p><small>after training</small><br>{text(after[i][1] if i < len(after) else "not yet known")}</p></div>'
             for i, (question, reply, _) in enumerate(before)]
    return f'<h2>What it says</h2>{"".join(cards)}' if cards else ""


def answer(tokens):
    """A reply whose tokens are the darker the surer the model was; hovering shows what else it considered."""
    if not tokens:
        return ""
    spans = []
    for token in tokens:
        others = "\n".join(f"{share:6.1%}  {printable(word)!r}" for word, share in token["likeliest"])
        about = f"{token['probability']:.1%}; the nucleus of top-p {token['top_p']:g} holds {token['nucleus']} tokens\n{others}"
        spans.append(f'<span style="background: color-mix(in srgb, var(--one) {55 * token["probability"]:.0f}%, transparent)" '
                     f'title="{text(about)}">{text(token["text"])}</span>')
    return ("<h2>How sure it was</h2><p class=soft>A reply after training. The stronger the colour, the likelier the token was to "
            "follow, before the penalty on what was said; point at one to see what else stood in the nucleus.</p>"
            f'<div class="card tokens">{"".join(spans)}</div>')


def example(tokens):
    """One training example; what is supervised is marked."""
    spans = [f'<span class="{"learned" if learned else ""}">{text(words)}</span>' for words, learned in tokens]
    return ("<h2>What is learned of an example</h2><p class=soft>The first one; marked is what the model is trained to say.</p>"
            f'<div class="card tokens">{"".join(spans)}</div>' if spans else "")


def evaluated(evaluation):
    """The table of python -m parrot.evaluate."""
    rows = evaluation.get("table", [])
    return "<h2>Evaluation</h2>" + table(rows[0], rows[1:]) if rows else ""


def data(about):
    """Lengths, categories, and what did not fit."""
    counts = about["counts"]
    told = [f"{counts[key]} {words}" for key, words in (
        ("context_cut", "had the middle of a context or of a long prompt cut out"), ("reply_cut", "lost the end of a reply"),
        ("dropped", "were dropped: too long"), ("bad", "could not be read and were left out")) if counts.get(key)]
    pictures = bars("Tokens in an example", about["lengths"]) + bars("Categories", counts["categories"])
    return (f"<h2>The data</h2><p>{about['examples']} examples to train on, {about['held_out']} held out. "
            f"{text('; '.join(told))}</p><div class=grid>{pictures}</div>")


def provenance(about):
    """Where everything came from, with which settings and versions."""
    def told(origin):
        return ", ".join(f"{key} {value}" for key, value in origin.items() if key != "files")
    rows = [("weights", told(about["weights"])), *((f"sha256 of {n}", h) for n, h in about["weights"]["files"].items()),
            ("data", told(about["data"])),
            ("settings", ", ".join(f"{key} {value}" for key, value in about["config"].items()
                                   if value is not None and value is not False)),  # 0 is a setting
            ("versions", ", ".join(f"{key} {value}" for key, value in about["versions"].items())),
            ("machine", f"{about['machine']}, {about['device']}, {about['processes']} process(es)")]
    return "<h2>Where it comes from</h2>" + table((), rows)
