"""What is asked of the machine, and what becomes of a wish that it cannot fulfil."""

from types import SimpleNamespace

import pytest
import torch

from parrot import device
from parrot.console import UserError
from parrot.device import multiplies_bfloat16, pick

CPU = torch.device("cpu")


@pytest.mark.parametrize("units, expected", [
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False), ({"avx2": True, "avx512_f": True}, False),
    ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"neon": True, "bf16": True}, True), ({"neon": True, "bf16": False}, False)])
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
    config = SimpleNamespace(device="cpu", dtype="bfloat16")
    assert pick(config) == (CPU, torch.float32) and config.dtype == "float32"
    assert "cpu" in (told := capsys.readouterr().err) and "float32" in told
    assert pick(config) == (CPU, torch.float32) and not capsys.readouterr().err  # once


def test_with_units_it_is_what_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: True)
    for name in ("bfloat16", "float32"):
        config = SimpleNamespace(device="cpu", dtype=name)
        assert pick(config) == (CPU, getattr(torch, name)) and config.dtype == name
    assert not capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what the test lacks")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device cuda"):
        pick(SimpleNamespace(device="cuda", dtype="bfloat16"))
