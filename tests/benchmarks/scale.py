"""Reading a large data set: records a second, memory, an interruption, the second start.

    python tests/benchmarks/scale.py                     as large as smol-smoltalk: 460,000
    python tests/benchmarks/scale.py --conversations 20000

The conversations are made from the words of the quick start's data, two to six turns of each some
700 characters, in four Parquet shards. Everything lies in a temporary folder, the cache too.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
from pyarrow import parquet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from parrot.data import load_examples  # noqa: E402
from parrot.files import hub  # noqa: E402
from parrot.files.records import read_conversations  # noqa: E402
from parrot.files.tokenizer import Tokenizer  # noqa: E402


def make_shards(folder, conversations, shards=4):
    """Write the data set; its size depends on nothing but the number of conversations."""
    words = [word for item in read_conversations(hub.QUICKSTART_DATA)
             for message in item.messages for word in message["content"].split()]
    rng = random.Random(0)

    def turn(number):
        start, length = rng.randrange(len(words) - 200), rng.randrange(60, 180)
        content = " ".join(words[start:start + length])
        return {"role": ("user", "assistant")[number % 2], "content": content}
    schema = pyarrow.schema([("messages", pyarrow.list_(pyarrow.struct(
        [("role", pyarrow.string()), ("content", pyarrow.string())]))), ("source", pyarrow.string())])
    size = 0
    for shard in range(shards):
        path = folder / f"train-{shard:05d}-of-{shards:05d}.parquet"
        with parquet.ParquetWriter(path, schema) as writer:
            for _ in range(0, conversations // shards, 1000):
                rows = [{"messages": [turn(n) for n in range(2 * rng.randint(1, 3))], "source": "made"}
                        for _ in range(min(1000, conversations // shards))]
                size += sum(len(m["content"]) for row in rows for m in row["messages"])
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return size


def read(data, weights):
    """The child: read everything, say how much it was and how much memory it took."""
    train, held_out, _ = load_examples(hub.find_data(data), Tokenizer(weights), 2048, 0.02)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    tokens = train.lengths.sum() + held_out.lengths.sum()
    print(f"{len(train) + len(held_out)} examples, {tokens / 1e6:.0f} M tokens, {peak:.2f} GB at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=460_000)
    parser.add_argument("--child", nargs=2, help="for this script's own use")
    args = parser.parse_args()
    if args.child:
        return read(*args.child)
    weights = hub.find_weights("instruct-q4").path.resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        print(f"{make_shards(folder / 'data', args.conversations) / 1e9:.2f} GB of text")
        command = [sys.executable, __file__, "--child", str(folder / "data"), str(weights)]
        started = time.perf_counter()
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:  # stopped after a while, as by Ctrl-C ...
            child.wait(args.conversations / 10_000)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            child.wait()
        stopped = time.perf_counter() - started
        print(f"stopped after {stopped:.0f} s")
        for title in ("started again", "the second time"):  # ... and started again
            started = time.perf_counter()
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            print(f"{title}: {seconds:.1f} s ({args.conversations / (seconds + stopped):.0f} records/s "
                  "with what was done before)" if title == "started again" else f"{title}: {seconds:.1f} s")
        kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        print(f"{kept / 1e9:.2f} GB of cache")


if __name__ == "__main__":
    main()
