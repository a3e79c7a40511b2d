"""Two machines that share no disk, as two processes with folders and caches of their own."""

import json
import shutil
import signal
import socket

from conftest import some_records
from forked import Forked

CODE = """
import os, signal, train
from parrot import training
from parrot.config import TrainConfig
from parrot.system.console import run_program
calls = []
def loss_sum(*args):
    calls.append(1)
    if {stop} and os.environ["RANK"] == "0" and len(calls) == 3:
        signal.raise_signal(signal.SIGINT)
    return training.loss_sum(*args)
run_program(lambda: train.train(TrainConfig(
    weights="model", data="data.jsonl", out="out", epochs=1, batch_size=8, learning_rate=1e-2, val_fraction=0.2,
    dtype="float32", device="cpu", micro_batch_tokens=1536, resume={resume}), loss_sum=loss_sum))
"""


def run(folders, stop=False, resume=False):
    """The exit statuses and the words of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, processes = CODE.format(stop=stop, resume=resume), []
    for rank, folder in enumerate(folders):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "XDG_CACHE_HOME": str(folder / "cache")}
        processes.append(Forked(code, cwd=folder, **place))
    statuses, _, words = zip(*[process.finish() for process in processes])
    return list(statuses), words


def test_a_run_on_two_machines_resumes(tmp_path, tiny_folder):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(tiny_folder, folder / "model")
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some_records(40)))
    statuses, words = run(folders, stop=True)
    assert statuses == [128 + signal.SIGINT] * 2, words
    assert (folders[0] / "out" / "checkpoint" / "state.safetensors").is_file() and not (folders[1] / "out").exists()
    statuses, words = run(folders, resume=True)
    assert statuses == [0, 0], words
    lines = [json.loads(line) for line in open(folders[0] / "out" / "metrics.jsonl", encoding="utf-8")]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 6)) and not (folders[1] / "out").exists()
