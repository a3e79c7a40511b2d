"""Whole runs on a tiny model: against a plain loop, interrupted, resumed, refused."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from conftest import some_records, tiny_model
from forked import Forked
from safetensors.torch import load_file
from test_training import reference_loss
from transformers import AutoModelForCausalLM

import train
from parrot import assistant, training
from parrot.config import TrainConfig
from parrot.data import examples_of_step, load_examples
from parrot.files.hub import find_data
from parrot.system.console import Interrupted, UserError
from parrot.system.distributed import Processes
from parrot.training import held_out_means, learning_rate


@pytest.fixture
def config(tiny_folder, tmp_path, records_file):
    """A function that makes the settings of a small run; its folder is `out` unless named."""
    data = records_file(some_records(40))

    def config(**changes):
        return TrainConfig(**{"weights": str(tiny_folder), "data": str(data), "out": str(tmp_path / "out"),
                              "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "val_fraction": 0.2,
                              "eval_every": 3, "save_every": 4, "dtype": "float32", "device": "cpu", **changes})
    return config


def metrics(folder):
    """metrics.jsonl without what time changes."""
    lines = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8")]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")} for line in lines]


def weights_of(folder):
    return open(os.path.join(folder, "model.safetensors"), "rb").read()


@pytest.mark.parametrize("plain", [True, False])
def test_a_run_equals_a_plain_loop_of_transformers(plain, config, tiny_tokenizer):
    """Order, schedule, clipping, AdamW, loss, held-out loss: all of it, in 10 steps."""
    c = config(val_fraction=0, weight_decay=0.1, max_steps=10, plain=plain)
    train.train(c)
    examples, _, _ = load_examples(find_data(c.data), tiny_tokenizer, c.max_length, 0)
    reference = AutoModelForCausalLM.from_pretrained(c.weights, dtype=torch.float32)
    groups = [{"params": [p for n, p in reference.named_parameters() if ("norm" in n) == scale],
               "weight_decay": 0 if scale else 0.1} for scale in (False, True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, line in zip(range(10), metrics(c.out)):
        loss = reference_loss(reference, examples, examples_of_step(step, examples, 8, 0))
        optimizer.zero_grad(), loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 10, 1e-2, 1e-3, 0.1)
        optimizer.step()
        assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["step"] == step + 1 and line["learning_rate"] == group["lr"]
    saved = load_file(os.path.join(c.out, "model.safetensors"))
    for name, parameter in reference.named_parameters():
        assert (saved[name] - parameter).norm() <= 1e-3 * parameter.norm(), name


def test_the_best_by_held_out_loss_stays(config, monkeypatch):
    """With a learning rate that ruins the model in the end, an earlier one is what is kept."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-2 if step < 20 else 1.0)
    c = config(epochs=6, eval_every=2)
    train.train(c)
    losses = {line["step"]: line["val_loss"] for line in metrics(c.out) if "val_loss" in line}
    about = json.load(open(os.path.join(c.out, "run.json")))
    best = min((loss, step) for step, loss in losses.items() if step)
    assert about["best_loss"] == best[0] < losses[max(losses)] and 0 < best[1] < max(losses)
    model, tokenizer = assistant.load_parts(c.out)
    _, held_out, _ = load_examples(find_data(c.data), tokenizer, c.max_length, c.val_fraction)
    assert held_out_means(model, held_out, 4096, torch.float32, Processes()) == pytest.approx({"val_loss": best[0]}, rel=1e-6)


def test_without_bfloat16_units_all_is_float32(config, monkeypatch):
    """What is computed, what is saved, and what is told of it."""
    monkeypatch.setattr("parrot.system.device.multiplies_bfloat16", lambda _: False)
    c = config(dtype="bfloat16", max_steps=2)
    train.train(c)
    assert {tensor.dtype for tensor in load_file(os.path.join(c.out, "model.safetensors")).values()} == {torch.float32}
    assert json.load(open(os.path.join(c.out, "run.json")))["dtype"] == "float32"
    exact = config(dtype="float32", max_steps=2, out=c.out + "-exact")
    train.train(exact)
    assert open(os.path.join(c.out, "model.safetensors"), "rb").read() == open(os.path.join(exact.out, "model.safetensors"), "rb").read()


def test_what_the_run_folder_says(config, capsys):
    c = config(dtype="bfloat16")
    train.train(c)
    about = json.load(open(os.path.join(c.out, "run.json")))
    assert about["finished"] and 1e8 < about["peak_memory"] < 1e11 and about["config"]["learning_rate"] == 1e-2 and list(about["data"]["files"]) == ["records.jsonl"]
    assert about["versions"]["torch"] == torch.__version__ and len(about["weights"]["files"]["model.safetensors"]) == 64
    assert all("seconds" in line for line in map(json.loads, open(os.path.join(c.out, "metrics.jsonl"))))
    lines = metrics(c.out)
    assert lines[0].keys() == {"step", "epoch", "val_loss"} and lines[0]["step"] == 0
    assert lines[1].keys() == {"step", "epoch", "train_loss", "learning_rate", "grad_norm", "tokens"}
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, about["steps"] + 1))
    assert lines[-1]["step"] == about["steps"] and "val_loss" in lines[-1]
    assert not os.path.exists(os.path.join(c.out, "checkpoint"))
    told = capsys.readouterr().err
    assert "before training:" in told and "after training:" in told and "tokens/s" in told


def test_same_seed_same_run_other_seed_other_order(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(config(out=str(tmp_path / name), seed=seed))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


# ---- interrupted and resumed

def start(c, *more, **environment):
    """train.py with these settings, in a process of its own."""
    flags = ["--weights", c.weights, "--data", c.data, "--out", c.out, "--epochs", c.epochs, "--batch-size", c.batch_size,
             "--learning-rate", c.learning_rate, "--val-fraction", c.val_fraction, "--eval-every", c.eval_every,
             "--save-every", c.save_every, "--dtype", c.dtype, "--device", "cpu", *more]
    return Forked("train.py", *flags, cwd=os.path.dirname(c.out), **environment)


def wait_for_step(process, folder, step):
    """Wait until the run has written the line of `step`."""
    path = os.path.join(folder, "metrics.jsonl")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if os.path.exists(path) and f'{{"step": {step},' in open(path).read():
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_a_stopped_run_resumes_to_the_same_bytes(config, tmp_path):
    """By Ctrl-C first, and by what `kill` sends once it has gone on."""
    c = config(epochs=10)
    train.train(config(epochs=10, out=str(tmp_path / "whole")))
    step = 0
    for number, status, flags in [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--resume"])]:
        process = start(c, *flags)
        wait_for_step(process, c.out, step + 7)
        process.send_signal(number)
        exit_status, _, told = process.finish()
        assert exit_status == status and "Traceback" not in told
        assert "--resume goes on from here" in told
        step = len([line for line in metrics(c.out) if "train_loss" in line])
        assert step < 40
    status, _, told = start(c, "--resume").finish()
    assert status == 0, told
    assert weights_of(c.out) == weights_of(tmp_path / "whole")
    assert metrics(c.out) == metrics(tmp_path / "whole")


def test_a_run_that_nobody_listens_to_any_more_is_saved(config, tmp_path):
    """`2>&1 | tee log`, where tee dies of the same Ctrl-C."""
    c = config(epochs=100, save_every=100_000)  # of 1,000 epochs, the blocks would be compiled
    process = start(c)
    wait_for_step(process, c.out, 3)
    process.send_signal(signal.SIGSTOP)  # so that it cannot write before it has the signal
    process.readers[1].close()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.join()
    assert process.exitcode == 130 and os.path.exists(os.path.join(c.out, "checkpoint"))


def test_a_home_that_the_shell_did_not_expand(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train.train(config(out="~/my run", max_steps=1))
    assert (tmp_path / "my run" / "model.safetensors").is_file()


def test_resume_checks_what_must_match_and_allows_what_may_differ(config, tmp_path, records_file, monkeypatch, tiny_tokenizer):
    assistant.save(tmp_path / "other", tiny_model(seed=9), tiny_tokenizer, torch.float32)
    c = config()
    eps = shutil.copytree(c.weights, tmp_path / "eps")
    (eps / "config.json").write_text((eps / "config.json").read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.1'))
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        train.train(c)
    monkeypatch.undo()
    for changes, words in [({"learning_rate": 2e-2}, "--learning-rate was 0.01, not 0.02"),
                           ({"seed": 1}, "--seed was 0"), ({"epochs": 3}, "--epochs was 2, not 3"),
                           ({"weights": str(tmp_path / "other")}, "--weights was"),
                           ({"weights": str(eps)}, "--weights was"),
                           ({"data": str(records_file(some_records(41), "more.jsonl"))}, "--data was")]:
        with pytest.raises(UserError, match=words):
            train.train(config(resume=True, **changes))
    train.train(config(resume=True, micro_batch_size=2, save_every=1))
    with pytest.raises(UserError, match="holds a finished run"):
        train.train(config(resume=True))
    with pytest.raises(UserError, match="holds a finished run"):
        train.train(c)


def interrupt_after(monkeypatch, step):
    """Send ourselves SIGINT while optimizer step `step` is under way."""
    original = training.loss_sum
    calls = []

    def accumulate(*args):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(train, "train", functools.partial(train.train, loss_sum=accumulate))


def test_interrupted_before_the_first_step(config, monkeypatch):
    """During the first evaluation there is nothing to save, and resuming starts from the beginning."""
    monkeypatch.setattr("parrot.training.held_out_means", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="after step 0"):
        train.train(config())
    monkeypatch.undo()
    train.train(config(resume=True))
    train.train(config(out=config().out + "-whole"))
    assert weights_of(config().out) == weights_of(config().out + "-whole")
    assert metrics(config().out) == metrics(config().out + "-whole")


@pytest.mark.parametrize("batch_size, epochs", [(32, 3), (1, 1)])
def test_two_processes_give_the_run_of_one(batch_size, epochs, config, tmp_path):
    """With gloo, a share of each step each; with one example a step, one of them has none."""
    c = config(batch_size=batch_size, epochs=epochs)
    train.train(config(batch_size=batch_size, epochs=epochs, out=str(tmp_path / "one")))
    assert json.load(open(tmp_path / "one" / "run.json"))["examples"] == 33
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [start(c, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    for status, _, told in [process.finish() for process in processes]:
        assert status == 0, told
    for ours, theirs in zip(metrics(c.out), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = (load_file(os.path.join(folder, "model.safetensors")) for folder in (tmp_path / "one", c.out))
    assert all((one[name] - two[name]).norm() <= 1e-4 * one[name].norm() for name in one)


def test_an_unfinished_run_is_not_written_over(config, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train.train(config())
    with pytest.raises(UserError, match="unfinished run: go on with --resume"):
        train.train(config())


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run's folder"):
        train.train(config())
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


# ---- runs that are only looked at

def test_a_dry_run_tells_and_writes_nothing(config, capsys):
    c = config(dry_run=True)
    train.train(c)
    told = capsys.readouterr()
    assert not os.path.exists(c.out) and "<|im_start|>user" in told.out
    assert re.search(r"an example has \d+ tokens \(mean\), .* \d+% of the tokens are targets", told.err)
    assert "10 steps on cpu" in told.err and "--out was not touched" in told.err
    assert re.search(r"all steps about \d+\.\d h, \d+\.\d GB of memory, \d+\.\d GB of disk", told.err)


def test_questions_of_ones_own_are_asked_before_and_after(config, capsys):
    c = config(ask=["How far is it?"], max_steps=1)
    train.train(c)
    about = json.load(open(os.path.join(c.out, "run.json")))
    assert capsys.readouterr().err.count("  How far is it?  ->  ") == 2
    assert all("How far is it?" in [question for question, _ in about[when]] for when in ("before", "after"))


def test_a_run_that_keeps_nothing_leaves_no_weights(config):
    c = config(keep="no", save_every=1, max_steps=3)
    train.train(c)
    assert sorted(os.listdir(c.out)) == ["README.md", "metrics.jsonl", "report.html", "run.json"]
    train.train(config(max_steps=3, out=c.out + "-kept"))
    assert metrics(c.out) == metrics(c.out + "-kept")


# ---- what goes wrong

def test_a_loss_that_is_not_finite_names_step_and_examples(config):
    c = config(learning_rate=1e30, min_learning_rate=1e30, grad_clip=0, save_every=1, epochs=3)
    with pytest.raises(UserError, match=r"step 2: the loss is .*records.jsonl:\d+, .*No checkpoint was written") as caught:
        train.train(c)  # the weights after step 1 are ruined
    assert str(caught.value).count("records.jsonl:") == 7
    assert not os.listdir(os.path.join(c.out, "checkpoint"))


def test_a_held_out_loss_that_is_not_finite_keeps_no_model(config):
    c = config(learning_rate=3e38, min_learning_rate=3e38, grad_clip=0, max_steps=1)
    with pytest.raises(UserError, match="held-out loss is nan"):
        train.train(c)
    assert not os.path.exists(os.path.join(c.out, "model.safetensors")) and len(metrics(c.out)) == 2


def test_the_last_good_checkpoint_outlives_a_bad_step(config, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train", functools.partial(train.train, loss_sum=lambda *args: calls.append(1) or (
        training.loss_sum(*args) + (float("nan") if len(calls) == 6 else 0))))
    with pytest.raises(UserError, match="step 6: the loss is nan.*state.safetensors is intact"):
        train.train(config(micro_batch_tokens=1536))
    monkeypatch.undo()
    train.train(config(micro_batch_tokens=1536, resume=True))
    train.train(config(micro_batch_tokens=1536, out=config().out + "-whole"))
    assert weights_of(config().out) == weights_of(config().out + "-whole")


def test_an_example_longer_than_the_context_is_left_out(config, records_file, capfd):
    long = records_file([{"prompt": "1" * 600, "completion": "A"}, *some_records(9)], "long.jsonl")
    train.train(config(data=str(long), val_fraction=0, max_steps=1))
    assert "1 examples left out: longer than 512 tokens" in capfd.readouterr().err


def test_names_in_bytes_that_are_no_text(config, records_file):
    """A file's name and a record's category that UTF-8 cannot express."""
    data = records_file([{**each, "category": "\ud800"} for each in some_records(9)], "o\udce9x.jsonl")
    c = config(data=str(data), max_steps=1)
    train.train(c)
    about = json.load(open(os.path.join(c.out, "run.json"), encoding="utf-8"))
    assert about["config"]["data"] == os.path.basename(c.data)


def test_there_is_nothing_to_resume(config, tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        train.train(config(resume=True))
    assert not os.path.exists(config().out)


def test_bad_data_from_the_command_line(config, tmp_path):
    c = config()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Q", "completion": "A"}\nnot json\n')
    status, _, told = start(config(data=str(tmp_path / "bad.jsonl"))).finish()
    assert status == 1 and "bad.jsonl:2: not JSON" in told and "Traceback" not in told
    assert not os.path.exists(c.out)


def test_few_examples_and_none_held_out(config, records_file, capsys):
    """Fewer examples than a batch train; where nothing is held out the last model is kept."""
    c = config(data=str(records_file(some_records(3), "three.jsonl")), val_fraction=0.001)
    train.train(c)
    assert "3 examples to train on, 0 held out, 2 steps" in capsys.readouterr().err
    assert len(metrics(c.out)) == 2 and weights_of(c.out)
