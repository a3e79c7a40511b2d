"""How the programs end: exit statuses, one line for people, nothing that a terminal obeys."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from parrot.system import console
from parrot.system.console import (
    Interrupted,
    StopSignal,
    UserError,
    printable,
    run_program,
    say,
    side_by_side,
)

posix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and a shell as POSIX has them")
NO_MEMORY = "error: out of memory: lower --micro-batch-tokens"
CASES = [(UserError("no such \x1b[2Jfile"), 1, "error: no such \\x1b[2Jfile\n"),
         (OSError(28, "No space left on device", "a/b"), 1,
          "error: No space left on device: 'a/b'\n"),
         (OSError(21, "Is a directory", "a\x1b[2Jb"), 1, "error: Is a directory: 'a\\x1b[2Jb'\n"),
         (MemoryError(), 1, NO_MEMORY), (MemoryError("no room"), 1, NO_MEMORY),
         (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
          "error: out of memory"),
         (RuntimeError("could not create a primitive"), 1, NO_MEMORY + " in training, "
          "--num-samples or --max-new-tokens in sampling (could not create a primitive)\n"),
         (RuntimeError("std::bad_alloc"), 1, "error: out of memory"),
         (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "error: out of memory"),
         (Interrupted("stopped after step 3", 143), 143, "stopped after step 3\n"),
         (KeyboardInterrupt(), 130, "interrupted\n")]


def ending(error):
    """The exit status of a program that raises `error`."""
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    return caught.value.code


@pytest.mark.parametrize("error, status, words", CASES)
def test_every_end_has_its_status_and_words(error, status, words, capsys):
    assert ending(error) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(words)


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_program(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@posix
@pytest.mark.parametrize("before, status", [(signal.SIG_DFL, 129), (signal.SIG_IGN, None)])
def test_a_hangup_is_noted_but_not_under_nohup(before, status):
    of_the_tests = signal.signal(signal.SIGHUP, before)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.status == status
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, of_the_tests)


def test_one_of_several_processes_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say("hello")
    assert capsys.readouterr().err == ""


def test_another_process_leaves_the_first_time_to_say_the_same(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(console.time, "sleep", waits.append)
    for rank, seconds in (("0", []), ("1", [3])):
        monkeypatch.setenv("RANK", rank)
        assert ending(UserError("no GPU")) == 1 and waits == seconds
        assert capsys.readouterr().err == "error: no GPU\n"


# ---- signals, and readers that leave

def program(body):
    """A command that runs this as the body of `main` of a program."""
    lines = "\n    ".join(body.splitlines())
    return [sys.executable, "-c", "import signal, sys, time\n"
            "from parrot.system.console import Interrupted, StopSignal, run_program, say\n"
            f"def main():\n    {lines}\nrun_program(main)"]


@posix
def test_the_first_signal_is_announced_once_and_the_second_ends_at_once(capsys):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.status == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(1)
    assert capsys.readouterr().err.count("stopping before the next update") == 1


def test_without_a_signal_nothing_is_announced(capsys):
    with StopSignal():
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


FULL_PIPE = """
with StopSignal() as stop:
    print("begun", flush=True)
    while stop.status is None:
        say("x" * 1000)
raise Interrupted("saved", stop.status)"""


@posix
def test_a_signal_while_the_terminal_is_stalled():
    """Ctrl-S, then Ctrl-C: once the terminal goes on, the run ends in good order."""
    with subprocess.Popen(program(FULL_PIPE), cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.5)  # by now it waits for its full pipe
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        try:
            _, printed = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert printed.count("at once, without saving)") == 1, printed[-500:]
    assert printed.endswith("\nsaved\n"), printed[-500:]


@posix
@pytest.mark.parametrize("when", ["before the signal", "after the signal", "in mid-line"])
def test_nobody_reads_stderr_any_more(when):
    """`| tee log`, where tee dies of the same Ctrl-C: what the run has to save is still saved."""
    body = {"before the signal": 'say("x")\nsignal.raise_signal(2)',
            "after the signal": 'signal.raise_signal(2)\ntime.sleep(1)',
            "in mid-line": 'sys.stderr.write("x")\nsignal.raise_signal(2)'}[when]
    body = 'sys.stdin.read()\nwith StopSignal() as stop:\n    ' + body.replace("\n", "\n    ")
    body += '\n    print("saved")\n    raise Interrupted("stopped", stop.status)'
    with subprocess.Popen(program(body), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stderr.close()
        process.stdin.close()
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 130


@posix
@pytest.mark.parametrize("body", ['print("reply")', 'print("reply", end="", flush=True)',
                                  'sys.stdout.write("x" * 100_000)'])
def test_nobody_reads_stdout_any_more(body):
    """`| true`: no noise, and the status that shells show for it."""
    with subprocess.Popen(program("sys.stdin.read()\n" + body), cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@posix
@pytest.mark.parametrize("redirection, status, words", [
    pytest.param("> /dev/full", 1, "error: No space left on device\n",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")),
    (">&-", 0, "to stderr\n"), ("2>&-", 0, "")])
def test_streams_that_are_full_or_closed(redirection, status, words):
    command = program('print("reply")\nsay("to stderr")')
    done = subprocess.run(["sh", "-c", f'"$@" {redirection}', "sh", *command], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, words)


# ---- text

@pytest.mark.parametrize("text, shown", [
    ("a\tb\nc d\u00a0e\u3000f", "a\tb\nc d\u00a0e\u3000f"),  # spaces are no control characters
    ("\x1b[2J\r\x7f\x9b\x00", r"\x1b[2J\r\x7f\x9b\x00"),
    ("abc\u202edef\u2066", r"abc\u202edef\u2066"),  # bidirectional
    ("a\u200bb\ufeff\u00ad\U000e0041", r"a\u200bb\ufeff\xad\U000e0041"),  # of no width
    ("a\u2028b\u2029", r"a\u2028b\u2029"),
    ("naïve 日本語 🦜 e\u0301", "naïve 日本語 🦜 e\u0301")])
def test_what_cannot_be_seen_is_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("token", ["hf_SecretSecretSecret", "hf_SecretSecretSecret\x01",
                                   "“hf_SecretSecretSecret”"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_token_for_the_hub_is_never_printed(name, token, monkeypatch, capsys):
    monkeypatch.setenv(name, token)
    quoted = UserError(f"Illegal header value {f'Bearer {token}'.encode()!r}")
    assert ending(quoted) == 1
    printed = capsys.readouterr().err
    assert "Secret" not in printed and "Illegal header value b'Bearer" in printed


def test_side_by_side_wraps_each_column():
    texts = ["one\n\n" + "word " * 8, "two\nshort"]
    for width in (60, 40):  # where it is too narrow, columns are too wide
        start = 28 + 2 if width == 60 else 24 + 2
        lines = [(line[:start].rstrip(), line[start:]) for line in side_by_side(texts, width).splitlines()]
        assert lines[:2] == [("one", "two"), ("", "short")]
        assert " ".join(word for word, _ in lines[2:]) == "word " * 7 + "word"
