"""How the programs talk to people: errors in one line, exit statuses, safe text."""

import os
import re
import signal
import sys
import textwrap
import threading
import time
import unicodedata
from itertools import zip_longest

# On a CPU torch has no exception class for these: some come from oneDNN and from C++.
NO_MEMORY = "MemoryError|out of memory|can't allocate memory|create a primitive|std::bad_alloc"


class UserError(Exception):
    """Something the user can fix: what was wrong, where, and what to do, in one line."""

    def __init__(self, text):
        super().__init__(" ".join(text.splitlines()))


def refuse(subject, faults):
    """Raise UserError with the first true one of {fault: whether it is so}, if there is one."""
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"{subject} {fault}")


class Interrupted(Exception):
    """Interrupted(message, exit status): a signal ended the run between updates."""


class _Stream:
    """stdout or stderr, flushed at every write. If nobody reads it any more, only stdout fails."""

    def __init__(self, stream, fails):
        self.stream, self.fails = stream or open(os.devnull, "w"), fails  # None: closed (2>&-)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what is buffered would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.fails:
                raise


def say(*lines):
    """Print to stderr: stdout belongs to the model's replies. Of several processes, one speaks."""
    if lines and os.environ.get("RANK", "0") == "0":
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def run_program(main):
    """Run `main()` and leave with its exit status, after one line on stderr if it failed."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # else it is closed
            stream.reconfigure(errors="replace")  # what cannot be shown, or read, is "?"
    sys.stdout, sys.stderr = _Stream(sys.stdout, fails=True), _Stream(sys.stderr, fails=False)
    try:
        return main()
    except BrokenPipeError:  # `| head`: what shells show for it, 128 + SIGPIPE
        sys.exit(141)
    except (Interrupted, KeyboardInterrupt) as error:
        line, status = error.args or ("interrupted", 130)
    except (UserError, OSError) as error:  # OSError: of a disk, a folder or a pipe
        line, status = re.sub(r"\[\w+ \d+\] ", "", f"error: {error}"), 1  # [Errno 28] helps nobody
    except (MemoryError, RuntimeError) as error:
        if not re.search(NO_MEMORY, f"{type(error)} {error}"):
            raise  # a bug
        line, status = ("error: out of memory: lower --micro-batch-tokens in training, "
                        f"--num-samples or --max-new-tokens in sampling ({error!s:.100})"), 1
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # if the first process has the same error, torchrun ends this one now
    print(printable(line), file=sys.stderr)
    sys.exit(status)


class StopSignal:
    """Notes Ctrl-C, SIGTERM or a hang-up in `status`, to exit with; a second one ends the run."""

    def __enter__(self):
        self.status, signals = None, [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signals.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.status is not None:
            raise KeyboardInterrupt
        self.status = 128 + number
        # A thread: the signal may have interrupted a print, and the terminal may be stalled.
        text = "\nstopping before the next update (once more: at once, without saving)"
        threading.Thread(target=say, args=[text], daemon=True).start()


def printable(text):
    """Text that is safe to show: invisible characters are escaped, the user's Hub token masked."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        for part in re.findall("[A-Za-z0-9_-]{8,}", os.environ.get(name, "")):
            text = text.replace(part, "***")
    hidden = {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")}
    return text.translate({ord(char): ascii(char)[1:-1] for char in hidden - {"\n", "\t"}})


def side_by_side(texts, width):
    """A list of texts -> one text with a column for each."""
    width = max(24, width // len(texts) - 2)
    columns = [[row for line in text.split("\n") for row in textwrap.wrap(line, width) or [""]]
               for text in texts]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
