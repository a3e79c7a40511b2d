"""How the programs end: exit statuses, one line for people, nothing that a terminal obeys."""

import signal

import pytest

from parrot.console import Interrupted, StopSignal, UserError, run_program, say

CASES = [(UserError("no such \x1b[2Jfile"), 1, "error: no such \\x1b[2Jfile\n"),
         (OSError(28, "No space left on device", "a/b"), 1, "error: a/b: No space left on device\n"),
         (OSError(21, "Is a directory", "a\x1b[2Jb"), 1, "error: a\\x1b[2Jb: Is a directory\n"),
         (MemoryError(), 1, "error: out of memory: lower --micro-batch-tokens"),
         (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of memory"),
         (RuntimeError("could not create a primitive"), 1, "error: out of memory: lower --micro-batch-tokens in training, "
          "--num-samples or --max-new-tokens in sampling (could not create a primitive)\n"),
         (RuntimeError("std::bad_alloc"), 1, "error: out of memory"),
         (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "error: out of memory"),
         (Interrupted("stopped after step 3", 143), 143, "stopped after step 3\n"),
         (KeyboardInterrupt(), 130, "interrupted\n")]


@pytest.mark.parametrize("error, status, words", CASES)
def test_every_end_has_its_status_and_words(error, status, words, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    told = capsys.readouterr()
    assert caught.value.code == status and told.out == "" and told.err.startswith(words)


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_program(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


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
