"""python tests/lesson/figures.py: draw the figures of parrot/README.md into .github/."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from parrot import assistant, attention, fast  # noqa: E402
from parrot.attention import Ribbon  # noqa: E402
from parrot.files import hub  # noqa: E402
from parrot.training import learning_rate  # noqa: E402

SENTENCE, LAYER, HEAD = "Anna gave Ben a book", 10, 1
BLUE = "#1f6feb"


def svg(width, height, *shapes):
    """A picture on white, so that it can be read on a dark page too."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n")


def text(x, y, words, anchor="middle", colour="#333"):
    """Words at a point."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def schedule(steps=29, peak=2e-4):
    """The learning rate of each step of the quick start."""
    width = 480 / steps
    rates = [learning_rate(step, steps, peak, peak / 10, 0.1) for step in range(steps)]
    bars = []
    for step, rate in enumerate(rates):
        height = 140 * rate / peak
        bars.append(f'<rect x="{60 + width * step:.1f}" y="{170 - height:.1f}" '
                    f'width="{width - 4:.1f}" height="{height:.1f}" fill="{BLUE}"/>')
    peak = f"{peak:.0e}".replace("e-0", "e-")
    return svg(560, 205, *bars, text(50, 35, peak, "end"), text(50, 170, "0", "end"),
               text(60, 190, "step 1", "start"), text(536, 190, f"step {steps}", "end"),
               text(60, 20, "warmup", "start"), text(300, 20, "half a cosine, to a tenth"))


@torch.no_grad()
def weights_of_head():
    """(tokens as text, attention weights (N, N) of one head): who looks at whom."""
    fast.enabled = False  # so that attention.attention is what runs
    model, tokenizer = assistant.load_parts(hub.find_weights("instruct-q4").path)
    by_the_formula, weights = attention.attention, []

    def watched(q, k, v, visible):
        one_hot = torch.eye(k.shape[-2]).expand(*k.shape[:-1], -1)  # as values: gives the weights
        weights.append(by_the_formula(q, k, one_hot, visible))  # (H, N, N)
        return by_the_formula(q, k, v, visible)

    attention.attention = watched
    tokens = tokenizer.encode(SENTENCE)
    model(torch.tensor(tokens), Ribbon([len(tokens)]))
    attention.attention = by_the_formula
    return [tokenizer.decode([token]).strip() for token in tokens], weights[LAYER][HEAD]


def grid(words, weights, size=62):
    """A row per token that looks, a column per token that is looked at, in percent."""
    shapes = []
    for i, word in enumerate(words):
        shapes.append(text(72, 64 + size * i, word, "end"))
        shapes.append(text(82 + size * i + size / 2, 22, word))
        for j in range(i + 1):
            weight = weights[i, j].item()
            shapes.append(f'<rect x="{82 + size * j}" y="{30 + size * i}" width="{size - 2}" '
                          f'height="{size - 2}" fill="{BLUE}" fill-opacity="{weight:.2f}" '
                          'stroke="#bbb"/>')
            shapes.append(text(81 + size * (j + 0.5), 64 + size * i, f"{weight:.0%}",
                               colour="white" if weight > 0.5 else "#333"))
    return svg(90 + size * len(words), 36 + size * len(words), *shapes)


if __name__ == "__main__":
    (ROOT / ".github" / "schedule.svg").write_text(schedule(), encoding="utf-8")
    (ROOT / ".github" / "attention.svg").write_text(grid(*weights_of_head()), encoding="utf-8")
