"""What is asked of the machine, and what becomes of a wish that it cannot fulfil."""

import pytest
import torch

from parrot.system import device
from parrot.system.console import UserError
from parrot.system.device import multiplies_bfloat16, peak_memory, pick, pick_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("units, expected", [
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ({"avx2": True, "avx512_f": True}, False), ({"avx512_bf16": True}, True),
    ({"amx_bf16": True}, True), ({"neon": True, "bf16": True}, True),
    ({"neon": True, "bf16": False}, False)])
def test_which_cpus_multiply_bfloat16(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert multiplies_bfloat16(CPU) == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bfloat16(CPU)


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_which_gpus_do(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert multiplies_bfloat16(torch.device("cuda", 0)) == expected


def test_without_units_it_is_float32_and_said(monkeypatch, capsys):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: False)
    assert pick("cpu", "bfloat16") == (CPU, torch.float32)
    printed = capsys.readouterr().err
    assert "cpu" in printed and "float32" in printed
    assert pick("cpu", "float32") == (CPU, torch.float32) and not capsys.readouterr().err


@pytest.mark.parametrize("capability, dtype", [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16),
                                               ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_the_type_of_each_gpu(capability, dtype, monkeypatch, capsys):
    monkeypatch.setattr(device, "pick_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert pick("auto", "bfloat16")[1] == dtype and pick("auto", "float32")[1] == torch.float32
    assert (str(dtype).removeprefix("torch.") in capsys.readouterr().err) == (dtype != torch.bfloat16)


def test_a_mac_computes_in_float32(monkeypatch):
    monkeypatch.setattr(device, "pick_device", lambda _: torch.device("mps"))
    for dtype in ("bfloat16", "float16", "float32"):
        assert pick("auto", dtype) == (torch.device("mps"), torch.float32)


@pytest.fixture
def two_gpus(monkeypatch):
    """The tiny sum works on them; on a third one it fails, as on a card of another generation."""
    def ones(size, device):
        if device.index == 2:
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
        return torch.zeros(size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)


def test_a_gpu_that_torch_has_no_code_for(two_gpus, monkeypatch, capsys):
    monkeypatch.setattr(device, "torchrun_place", lambda: (0, 1, 2))
    assert pick_device("auto") == CPU
    said = "cuda:2 does not compute: CUDA error: no kernel image is available"
    assert capsys.readouterr().err == f"{said} (computing on the CPU)\n"
    with pytest.raises(UserError, match=f"--device cuda: {said}$"):
        pick_device("cuda")


def test_with_units_it_is_what_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: True)
    for name in ("bfloat16", "float32"):
        assert pick("cpu", name) == (CPU, getattr(torch, name))
    assert not capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what the test lacks")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device cuda: cuda:0 does not compute: "):
        pick("cuda", "bfloat16")


def test_each_process_has_a_gpu_of_its_own(two_gpus, monkeypatch):
    """Else it is an error, with auto too: among GPUs, no process may go on alone on the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "3"), monkeypatch.setenv("MASTER_ADDR", "localhost")
    for index in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(index))
        assert pick_device("auto") == torch.device("cuda", index)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match=f"--device {name}: cuda:2 does not compute: CUDA error"):
            pick_device(name)
    assert pick_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(UserError, match="not what torchrun sets"):
        pick_device("cuda")


def test_peak_memory_is_in_bytes():
    assert peak_memory(CPU) == 0 or 5e7 < peak_memory(CPU) < 1e12
