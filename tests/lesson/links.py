"""python tests/lesson/links.py: set the line numbers of the links in parrot/README.md.

A link names what stands at its lines, so that its numbers follow when the code moves:

    [`data.Batch.of`](data.py#L1-L2)              a function or class: all of it
    [train.py, "The division"](../train.py#L1-L2)     a line with these words, and as many more
"""

import ast
import re
from pathlib import Path

WALK = Path(__file__).resolve().parents[2] / "parrot" / "README.md"
LINK = re.compile(r"\[([^\]]*)\]\(([\w./]+\.py)#L(\d+)-L(\d+)\)")


def lines_of(path, name):
    """First and last line of a function or class such as Batch.of. LookupError."""
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        children = [child for child in node.body if getattr(child, "name", None) == part]
        if len(children) != 1:
            raise LookupError(f"{path.name} has {len(children)} of {name}")
        node = children[0]
    return node.lineno, node.end_lineno


def line_with(path, words):
    """The number of the one line that has these words. LookupError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if words in line]
    if len(numbers) != 1:
        raise LookupError(f"{path.name} has {words!r} in {len(numbers)} lines")
    return numbers[0]


def corrected(link):
    """A link, as a match of LINK -> the same with the line numbers of today."""
    label, target, first, last = link.groups()
    path = WALK.parent / target
    if label.startswith("`"):
        first, last = lines_of(path, label.strip("`").split(".", 1)[1])
    else:
        length = int(last) - int(first)
        first = line_with(path, label.split('"')[1])
        last = first + length
    return f"[{label}]({target}#L{first}-L{last})"


if __name__ == "__main__":
    WALK.write_text(LINK.sub(corrected, WALK.read_text(encoding="utf-8")), encoding="utf-8")
