"""Foreign files, damaged at random: whatever they hold, they load, or are one line that names them.

A few seeds of each format run with the tests. For longer:

    FUZZ_SECONDS=600 FUZZ_SEED=1000 python -m pytest -m long tests/test_fuzz.py -s
"""

import csv
import gzip
import io
import json
import os
import random
import shutil
import time

import pyarrow
import pytest
from conftest import some_records
from files.test_gguf_import import tiny_fields, tiny_tensors, write_gguf
from pyarrow import parquet
from run.test_folder import trained

import train
from parrot import assistant
from parrot.config import TrainConfig
from parrot.data import load_examples
from parrot.files import hub
from parrot.files.gguf_import import import_gguf
from parrot.run import folder as run_folder
from parrot.run import report
from parrot.run.folder import Progress, RunFolder
from parrot.system.console import UserError

LINES = "".join(json.dumps(record) + "\n" for record in some_records(6))


def make_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(some_records(40)), path, row_group_size=10)


def make_csv(path):
    file = io.StringIO()
    writer = csv.DictWriter(file, some_records(1)[0])
    writer.writeheader()
    writer.writerows(some_records(6))
    path.write_text(file.getvalue(), encoding="utf-8")


DATA = {"data.jsonl": lambda path: path.write_text(LINES), "data.json": lambda path: path.write_text(json.dumps(some_records(6))),
        "utf16.jsonl": lambda path: path.write_bytes(LINES.encode("utf-16")), "data.csv": make_csv, "data.parquet": make_parquet,
        "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode(), mtime=0))}
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
RUN = ("run.json", "metrics.jsonl")
FORMATS = [*DATA, "tiny.gguf", *MODEL, *RUN, "state.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, tiny_tokenizer):
    """A folder with a whole file of each format."""
    folder = tmp_path_factory.mktemp("whole")
    for name, make in DATA.items():
        make(folder / name)
    write_gguf(folder / "tiny.gguf", tiny_fields(tiny_tokenizer), tiny_tensors())
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    config = TrainConfig(weights=str(tiny_folder), data=str(folder / "data.jsonl"), out=str(folder / "run"), val_fraction=0.0,
                         device="cpu", dtype="float32", max_steps=2, batch_size=2)
    train.train(config)
    for name in RUN[:2]:
        shutil.copy(folder / "run" / name, folder)
    run = RunFolder(TrainConfig(out=str(folder / "other")))
    run.checkpoint.parent.mkdir(parents=True)
    run.metrics.touch()
    run.save_checkpoint(*trained(1), Progress(step=1))
    shutil.copy(run.checkpoint, folder)
    return folder


def damaged(content, chance):
    """Some bytes changed, cut out, doubled, or replaced by what parsers stumble over."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        # The beginning of a file says how to read the rest.
        at = chance.randrange(min(len(content), chance.choice((64, 600, 10**9))) or 1)
        kind = chance.randrange(6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at:at + chance.randrange(1, 40)] = b""
        elif kind == 2:
            content[at:at] = content[at:at + chance.randrange(1, 200)]
        elif kind == 3:
            content[at:at + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little"), b"\x01" + b"\0" * 7))
        elif kind == 4:
            content[at:at + 1] = chance.choice((b"null", b"[", b"{", b'"', b"-1", b"1e999", b"9" * 50, b"\\ud800", b"true", b"\xff", b"\0"))
        else:
            del content[at:]
    return bytes(content)


def load(name, folder, tokenizer):
    """What the programs do with a file of this name in `folder`."""
    if name in DATA:
        load_examples(hub.find_data(str(folder / name)), tokenizer, 512, 0.0)
    elif name == "tiny.gguf":
        (folder / "imported").mkdir()
        import_gguf(folder / name, folder / "imported")
        assistant.load_parts(folder / "imported")
    elif name in MODEL:
        model, words = assistant.load_parts(hub.find_weights(str(folder)).path)
        assistant.Assistant("", model, words)
    elif name in RUN:
        report.write(folder)
    else:
        with report.blaming(folder / name):
            run_folder.load_checkpoint(folder / name, run_folder.tensors_of(*trained(0)))


def try_once(name, seed, whole, folder, tokenizer):
    """Whether a file of this format, damaged by this seed, still loads. Anything but a UserError is a fault."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    needed = [name] if name in DATA or name in ("tiny.gguf", "state.safetensors") else RUN if name in RUN else MODEL
    for other in needed:
        shutil.copy(whole / other, folder)
    path = folder / name
    path.write_bytes(damaged(path.read_bytes(), random.Random(f"{name} {seed}")))
    try:
        load(name, folder, tokenizer)
    except UserError as error:
        assert "\n" not in str(error).strip() and str(folder) in str(error), f"{name} {seed}: {error}"
        return False
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_loads_or_is_one_line(name, whole, tmp_path, tiny_tokenizer):
    for seed in range(12):
        try_once(name, seed, whole, tmp_path / "folder", tiny_tokenizer)


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files(name, whole, tmp_path, tiny_tokenizer):
    first = seed = int(os.environ.get("FUZZ_SEED", "1000"))
    until, loaded, faults = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "60")) / len(FORMATS), 0, []
    while time.monotonic() < until:
        seed += 1
        try:
            loaded += try_once(name, seed, whole, tmp_path / "folder", tiny_tokenizer)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{seed}: {type(error).__name__}: {error!s:.200}")
    print(f"\n{name}: {seed - first} tried, {loaded} loaded, {len(faults)} faults")
    assert not faults, faults[:10]
