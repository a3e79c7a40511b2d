"""Runs that die: killed at any moment, or by a full disk, they resume to the same bytes.

The runs are processes of their own, forked from one that has imported everything already, so
that each takes a fraction of a second.
"""

import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

import pytest
import torch
import torch._dynamo  # noqa: F401  (the first optimizer would import it, slowly)
from conftest import some_records

import train
from parrot import assistant, training
from parrot.config import TrainConfig
from parrot.fast import compiling
from parrot.files import model_folder
from parrot.files.hub import QUICKSTART_DATA
from parrot.run import folder as checkpoint
from parrot.system.console import run_program
from parrot.system.device import multiplies_bfloat16

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_killed", "parrot.files.hub"])


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Started with a path on which it finds this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()


class Training(FORK.Process):
    """A training run in a process of its own, from `prepare(*arguments)` on."""

    def __init__(self, config, prepare=None, *arguments):
        super().__init__()
        self.config, self.prepare, self.arguments = config, prepare, arguments
        self.told, self.sender = FORK.Pipe(duplex=False)
        self.start()

    def run(self):
        sys.stderr = io.StringIO()
        if self.prepare:
            self.prepare(*self.arguments)
        try:
            run_program(lambda: train.train(self.config))
        except Exception:
            traceback.print_exc()
            raise
        finally:
            self.sender.send((len(TOUCHES), sys.stderr.getvalue()))

    def finish(self):
        """Wait for the end -> (exit status, times that it touched the disk, its words)."""
        self.join(120)
        return self.exitcode, *(self.told.recv() if self.told.poll() else (None, ""))


def resumed(config):
    """The settings to go on with: --resume where the first start got far enough to write run.json."""
    config.resume = os.path.exists(os.path.join(config.out, "run.json"))
    return config


# ---- ways to die

TOUCHES = []  # what the run did to the disk so far


def at_touch(number, action, *arguments):
    """Call `action(*arguments)` just before the run changes something on the disk for the `number`-th time."""
    def hook(event, about):
        writes = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"):
            TOUCHES.append(event)
            if len(TOUCHES) == number:
                action(*arguments)
    sys.addaudithook(hook)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def no_file_larger_than(size):
    """A limit of the kernel: writing past it fails, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_half_way_through(number, share):
    """Die when `share` of the `number`-th tensor file is on the disk."""
    written = []

    def dying(save_file):
        def save(tensors, path, **more):
            save_file(tensors, path, **more)
            written.append(path)
            if len(written) == number:
                os.truncate(path, int(os.path.getsize(path) * share))
                die()
        return save
    checkpoint.save_file = dying(checkpoint.save_file)
    model_folder.safetensors.torch.save_file = dying(model_folder.safetensors.torch.save_file)


# ---- the runs

@pytest.fixture
def settings(tiny_folder, tmp_path, records_file):
    """A function that makes the settings of a small run that evaluates and saves often."""
    data = records_file(some_records(24))

    def settings(name="out", **changes):
        return TrainConfig(**{"weights": str(tiny_folder), "data": str(data), "out": str(tmp_path / name),
                              "epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "val_fraction": 0.3,
                              "eval_every": 3, "save_every": 2, "device": "cpu", **changes})
    return settings


@pytest.fixture(params=["float32", "bfloat16"])
def config(request, settings):
    """The same in both types of the matrix products."""
    if request.param == "bfloat16" and not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("would be float32 once more on this CPU")
    return functools.partial(settings, dtype=request.param)


def outcome(folder):
    """What must be the same: the bytes of the model, and the metrics but for times."""
    lines = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8")]
    return ([{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")} for line in lines],
            open(os.path.join(folder, "model.safetensors"), "rb").read())


WHOLE = {}  # by dtype: where a run's folder lies makes no difference, so one does for all tests


@pytest.fixture
def whole(config, tmp_path):
    """(outcome, seconds, touches of the disk) of the run that nothing stopped."""
    dtype = config.keywords["dtype"]
    if dtype not in WHOLE:
        seconds = []
        for name in ("warm", "again", "whole"):  # the first one waits for the imports
            began = time.monotonic()
            status, touches, told = Training(config(name), at_touch, 0, die).finish()
            assert status == 0, told
            seconds.append(time.monotonic() - began)
        WHOLE[dtype] = outcome(tmp_path / "whole"), min(seconds), touches
    return WHOLE[dtype]


def end_of(config):
    """Resume, if it is not finished -> the outcome."""
    if not finished(config):
        status, _, told = Training(resumed(config)).finish()
        assert status == 0, told
    return outcome(config.out)


def the_best_so_far_is_whole(config):
    """Whoever cannot wait for the end may use it."""
    if os.path.exists(os.path.join(config.out, "model.safetensors")):
        assistant.load_parts(config.out)


def finished(config):
    path = os.path.join(config.out, "run.json")
    return os.path.exists(path) and json.load(open(path, encoding="utf-8")).get("finished")


def test_killed_at_random_moments(config, whole):
    """6 kills, other ones in each type, in whatever the run does: reading, a step, an evaluation; two in a row."""
    chance, kills = random.Random(config.keywords["dtype"]), 0
    for number in range(3):
        c = config(f"run-{number}")
        while kills < 2 * (number + 1):
            if finished(c):  # before it died twice
                c = config(f"run-{number}-{kills}")
            process = Training(resumed(c))
            time.sleep(chance.uniform(0, whole[1]))
            process.kill()
            kills += process.finish()[0] == -9
        assert end_of(c) == whole[0]


def test_killed_while_writing(config, whole):
    """10 moments, other ones in each type, before something is opened, renamed or deleted; two in each run."""
    moments = random.Random(config.keywords["dtype"]).sample(range(1, whole[2] + 1), 10)
    for number in range(5):
        assert dead_at(moments[2 * number:2 * number + 2], config(f"run-{number}")) == whole[0]


def dead_at(moments, c):
    """The outcome of a run that died just before each of these touches of the disk."""
    for moment in moments:
        if not finished(c):
            status, _, told = Training(resumed(c), at_touch, moment, die).finish()
            assert status in (-9, 0), told
            the_best_so_far_is_whole(c)
    return end_of(c)


@pytest.mark.parametrize("number, share", [(1, 0), (2, 0.5), (3, 0.99), (5, 0.3)])
def test_killed_half_way_through_a_tensor_file(number, share, config, whole):
    c = config()
    assert Training(c, die_half_way_through, number, share).finish()[0] == -9
    the_best_so_far_is_whole(c)
    assert end_of(c) == whole[0]


def test_the_disk_fills(config, whole):
    """At any moment: an error in words, and what was saved resumes once there is room again."""
    for moment in random.Random(2).sample(range(2, whole[2]), 6):
        assert full_at(moment, config(f"full-{moment}")) == whole[0]


def full_at(moment, c):
    """The outcome of a run for which the disk was full for a while."""
    status, _, told = Training(c, at_touch, moment, no_file_larger_than, 200).finish()
    assert "Traceback" not in told
    if status:  # else only small things were left to write
        assert status == 1 and "cannot write into" in told and "File too large" in told
        assert "is intact: --resume continues" in told or "No checkpoint was written yet" in told
    return end_of(c)


def no_more_memory():
    """From the first gradient on, the kernel gives this process no more memory."""
    original = training.loss_sum

    def accumulate(*arguments):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        return original(*arguments)
    torch.set_num_threads(1)
    train.train = functools.partial(train.train, loss_sum=accumulate)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_says_what_to_lower(settings, records_file):
    data = records_file([{"prompt": f"{n}", "completion": "1" * 400} for n in range(200)], "long.jsonl")
    c = settings(data=str(data), batch_size=128, micro_batch_tokens=10**6)
    status, _, told = Training(c, no_more_memory).finish()
    assert status == 1 and "out of memory: lower --micro-batch-tokens" in told and "Traceback" not in told, told


def as_nobody():
    """A user who may not write into any folder of the tests (root may, whatever its mode)."""
    b"\\n".decode("unicode_escape")  # jinja2 loads this codec late, perhaps from a folder that only root reads
    if os.getuid() == 0:
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
        os.chown(os.environ["XDG_CACHE_HOME"], 65534, 65534)
        os.seteuid(65534)


@pytest.fixture
def shelf(settings, tiny_folder):
    """(settings of a run, the folder of all its files), which anybody may read."""
    with tempfile.TemporaryDirectory() as shelf:
        c = settings(weights=shutil.copytree(tiny_folder, os.path.join(shelf, "model")), out=os.path.join(shelf, "out"))
        c.data = shutil.copy(c.data, shelf)
        for folder in (shelf, c.weights):
            os.chmod(folder, 0o755)
        yield c, shelf
        os.chmod(shelf, 0o755)


def test_a_folder_that_may_not_be_written(shelf):
    c, folder = shelf
    os.chmod(folder, 0o555)
    status, _, told = Training(c, as_nobody).finish()
    assert status == 1 and f"cannot write into {c.out}: Permission denied" in told and "Traceback" not in told, told


@pytest.mark.parametrize("forbidden", ["records.jsonl", "model/config.json", "model/tokenizer.json", "model/model.safetensors"])
def test_files_that_may_not_be_read(forbidden, shelf):
    c, folder = shelf
    os.chmod(os.path.join(folder, forbidden), 0)
    status, _, told = Training(c, as_nobody).finish()
    assert status == 1 and f"{os.path.join(folder, forbidden)}" in told and "Permission denied" in told, told
    assert "Traceback" not in told and not os.path.exists(c.out)


@pytest.mark.long
def test_real_weights_in_bfloat16_killed_and_resumed(settings, q4_folder, tmp_path):
    """What a tiny model might hide: threads, long documents, 134 million parameters."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(QUICKSTART_DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    real = functools.partial(settings, weights=str(q4_folder), data=str(few), batch_size=8, learning_rate=1e-4,
                             max_steps=6, dtype="bfloat16")
    began = time.monotonic()
    assert Training(real("whole")).finish()[0] == 0
    seconds, chance = time.monotonic() - began, random.Random(0)
    for _ in range(5):
        if not finished(real("out")):
            process = Training(resumed(real("out")))
            time.sleep(chance.uniform(0.2, 0.9) * seconds)
            process.kill()
            process.finish()
    assert end_of(real("out")) == outcome(real("whole").out)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_and_resumed(settings):
    """Compiled code is made for the first ribbon it sees, which after resuming is another one."""
    c = functools.partial(settings, compile="on", save_every=1, eval_every=100)
    status, _, told = Training(c("whole")).finish()
    assert status == 0 and ", compiled" in told, told
    for moment in (60, 80):  # after some steps
        Training(resumed(c("out")), at_touch, moment, die).finish()
    assert end_of(c("out")) == outcome(c("whole").out)


def no_compiler(folder):
    """No C++ compiler to be found, nothing compiled before, and a run long enough to want it."""
    os.environ |= {"PATH": "", "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": folder}
    compiling.EARNED_BACK["cpu"] = 0


def test_without_a_compiler(settings, tmp_path):
    status, _, told = Training(settings("auto"), no_compiler, str(tmp_path / "cache")).finish()
    assert status == 0 and "torch.compile does not work here" in told and ", compiled" not in told, told
    status, _, told = Training(settings("on", compile="on"), no_compiler, str(tmp_path / "cache")).finish()
    assert status == 1 and "error: --compile on: torch.compile does not work here" in told and "Traceback" not in told
    Training(settings("off", compile="off")).finish()
    assert outcome(settings("auto").out) == outcome(settings("off").out)


@pytest.mark.long
def test_killed_and_full_at_every_touch_of_the_disk(config, whole):
    for moment in range(1, whole[2] + 1):
        assert dead_at([moment], config(f"killed-{moment}")) == whole[0]
        assert full_at(moment, config(f"full-{moment}")) == whole[0]
