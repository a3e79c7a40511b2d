"""Programs in processes of their own that start at once: forked from one that has torch imported.

A new interpreter takes seconds of both cores to import torch. Here one process does so for all
tests; the programs are forked from it, with arguments, folder, environment and pipes of their own.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import traceback

import pytest
from conftest import ROOT

FORK = multiprocessing.get_context("forkserver")
# Others of these tests have the same server. test_killed imports train; huggingface_hub must not be
# imported, since it reads the environment only then.
PRELOAD = ["test_killed", "forked", "train", "sample", "torch._dynamo", "parrot.files.hub"]


class Forked(FORK.Process):
    """A program: code, or the path of a script of ours. communicate() as with subprocess.Popen."""

    def __init__(self, program, *argv, cwd, **environment):
        super().__init__()
        self.program, self.argv, self.cwd = program, [str(word) for word in argv], str(cwd)
        self.environment = {**os.environ, **environment}
        readers, self.writers = zip(*(FORK.Pipe(duplex=False) for _ in range(2)))
        with pytest.MonkeyPatch.context() as patch:  # the server finds this module and test_killed
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            FORK.set_forkserver_preload(PRELOAD)
            multiprocessing.forkserver.ensure_running()
        self.start()
        self.readers = readers  # which stay here
        for writer in self.writers:
            writer.close()

    def run(self):
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        for number, writer in enumerate(self.writers, start=1):
            os.dup2(writer.fileno(), number)
            writer.close()
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))
        sys.argv = [str(ROOT / self.program), *self.argv]
        try:
            if self.program.endswith(".py"):
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                exec(self.program, {"__name__": "__main__"})
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        return self.exitcode

    def communicate(self):
        """Wait for the end -> what it wrote to stdout and stderr."""
        texts = [read(reader) for reader in self.readers]
        self.join(60)
        if self.exitcode is None:
            self.send_signal(signal.SIGKILL)
        return texts

    def finish(self):
        """-> (exit status, stdout, stderr)"""
        texts = self.communicate()
        return self.exitcode, *texts


def read(reader):
    with open(os.dup(reader.fileno()), encoding="utf-8") as file:
        return file.read()
