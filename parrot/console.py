"""How the programs talk to people: errors in one line, exit statuses, safe text.

A `UserError` is for what its reader can mend: what was wrong, where, and what to do.
Anything else that goes wrong is our own fault and keeps its traceback.
"""

import os
import signal
import sys
import textwrap
from itertools import zip_longest


# torch's own errors have no class of their own on a CPU; the last two are oneDNN's and the C++ library's words.
OUT_OF_MEMORY = "out of memory", "can't allocate memory", "could not create a primitive", "std::bad_alloc"

CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class UserError(Exception):
    """Something the user can mend; its text is the whole message."""


class Interrupted(Exception):
    """A signal ended the run in good order; `status` is what the process exits with."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def say(*lines):
    """Print to stderr: stdout belongs to the model's replies. Of several processes, one speaks."""
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        print(printable(line), file=sys.stderr, flush=True)


def run_program(main):
    """Run `main()` and leave with its exit status: 0, 1 (an error in words) or 130 (Ctrl-C)."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed (2>&-): print would take stdout instead
    for stream in (sys.stdin, sys.stdout):  # what cannot be shown, or read, is "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = "".join(f" ({line[:100]})" for line in str(error).splitlines()[:1])  # oneDNN's words may mean another
        print(printable("error: out of memory: lower --micro-batch-tokens in training, --num-samples or "
                        f"--max-new-tokens in sampling{reason}"), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our words has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a disk, a folder or a pipe that refuses
        print(printable(f"error: {error.filename or 'input or output'}: {error.strerror or error}"), file=sys.stderr)
        sys.exit(1)
    except Interrupted as interruption:
        say(str(interruption))
        sys.exit(interruption.status)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


class StopSignal:
    """Notes Ctrl-C, SIGTERM or a hang-up instead of dying of it; a second one ends the process at once.

    `status` is None until then, and afterwards what the process should exit with.
    """

    def __enter__(self):
        self.status = None
        hangup = [s for s in (getattr(signal, "SIGHUP", None),) if s and signal.getsignal(s) != signal.SIG_IGN]  # nohup's
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, *hangup)}
        return self

    def _note(self, number, frame):
        if self.status is not None:
            raise KeyboardInterrupt
        self.status = 128 + number
        try:
            say("\nstopping after this step (once more: at once, without saving)")
        except OSError:  # the terminal is gone, or `| tee` died of the same Ctrl-C: from now on nobody listens
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def printable(text):
    r"""Show control characters instead of sending them to the terminal, which would obey them.

    >>> printable("a\tb\n\x1b[31mred")
    'a\tb\n\\x1b[31mred'
    """
    return text.translate(CONTROL)


def side_by_side(columns, width):
    """Lists of texts -> one text with a column for each list, or below each other if too narrow."""
    each = width // len(columns) - 2
    if each < 24:
        return "\n\n".join("\n".join(column) for column in columns)
    wrapped = [[line for text in column for part in text.split("\n")
                for line in textwrap.wrap(part, each) or [""]] for column in columns]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join("  ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)
