"""Devices without kernels of their own: ROCm, MPS, and those that have no float64."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import simulated_cuda
import torch
from calls import CALLS
from torch import nn
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from pyqkern import calibrate, replace_embedding, replace_linear, replace_recurrent
from pyqkern.analysis import range_report
from pyqkern.calibration.observers import OBSERVERS
from pyqkern.cli.info import describe

GPU = torch.device("cuda", 0)

# ---- ROCm, whose devices are called "cuda"


def test_rocm_is_served_by_plain_torch() -> None:
    """Without Triton, so that one of its kernels would be an ImportError. INT8's numbers are the CPU's bit for bit."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent / "support")!r})
sys.modules["triton"] = None
import copy, torch
torch.version.hip = "6.2"
import pyqkern
from pyqkern.backends import reference
from pyqkern.ops import registry
from simulated_cuda import simulated_cuda
from torch import nn
GPU = torch.device("cuda", 0)
assert registry.kernels_of(GPU) is reference
torch.manual_seed(0)
x, ids = torch.randn(5, 128), torch.arange(7)
for scheme in ("int8", "int8-a7", "int8-outlier", "int8-weight-only", "nf4", "int4"):
    model = nn.ModuleList([nn.Linear(128, 40), nn.Embedding(9, 128)])
    pyqkern.replace_linear(model, scheme)
    if model[0].scheme.embeds:
        pyqkern.replace_embedding(model, scheme)
    with torch.no_grad(), simulated_cuda():
        there = copy.deepcopy(model).to(GPU)
        y, rows = there[0](x.to(GPU)), there[1](ids.to(GPU))
        assert y.is_cuda and rows.is_cuda and there[0].packed.shape in there[0]._packed_shapes("weight", reference)
        expected, table = model[0](x), model[1](ids)
        error = (y.cpu() - expected).norm() / expected.norm()
        # "auto" of 4 bits is integers on the CPU, with codes of 1/127 and levels of 1/32, and fp32 here
        assert error <= (0.03 if scheme in ("nf4", "int4") else 2e-6 if "-o" in scheme or "-w" in scheme else 0), error
        assert torch.equal(rows.cpu(), table)
print("served")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "served", result.stderr


def test_the_triton_kernels_refuse_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from pyqkern.kernels import device

    monkeypatch.setattr(device, "INTERPRETED", True)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(RuntimeError, match=r"for CUDA, got a build of torch for ROCm 6\.2"):
        device.check_device(x=torch.zeros(2))


def test_info_says_what_rocm_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="MI300X", total_memory=192 * 2**30, major=9, minor=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe()["cuda"].startswith("MI300X, 192.0 GiB, compute capability 9.4, CUDA ")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert describe()["cuda"] == "MI300X, 192.0 GiB, with ROCm: plain torch instead of kernels"


# ---- MPS, which is refused


SAID = "do not run on mps, got a tensor there; keep the model on the CPU"


@pytest.mark.parametrize("name", CALLS)
def test_operators_refuse_mps(name: str) -> None:
    with pytest.raises(RuntimeError, match=SAID):
        getattr(torch.ops.pyqkern, name).default.redispatch(DispatchKeySet(DispatchKey.MPS), *CALLS[name][0])


@pytest.mark.parametrize(
    "replace, layer",
    [
        (replace_linear, nn.Linear(64, 32)),
        (replace_embedding, nn.Embedding(64, 32)),
        (replace_recurrent, nn.LSTM(64, 32)),
    ],
)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_modules_refuse_mps(replace: Any, layer: nn.Module, scheme: str) -> None:
    model = replace(nn.Sequential(copy.deepcopy(layer)), scheme)
    before = {name: tensor.device for name, tensor in model.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=SAID):
        model._apply(lambda tensor: torch.empty_like(tensor, device="mps"))  # what .to("mps") does
    assert {name: tensor.device for name, tensor in model.state_dict().items()} == before


# ---- float models on a device without float64 are looked at there


@pytest.fixture
def no_float64() -> Iterator[None]:
    """A simulated device that is asked for no float64, as MPS, and has none."""
    run = simulated_cuda._run

    def refusing(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = run(operator, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, simulated_cuda.SimulatedTensor) and leaf.dtype is torch.float64:
                raise TypeError("Cannot convert a tensor to float64 dtype: the framework doesn't support float64")
        return result

    with mock.patch.object(simulated_cuda, "_run", refusing), simulated_cuda.simulated_cuda():
        with pytest.raises(TypeError):
            torch.ones(2).to(GPU).double()
        yield


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_calibration_without_float64(no_float64: None, observer: str, per_channel: bool) -> None:
    batches = [torch.randn(9, 8), torch.full((2, 8), -1e-45), 1000 * torch.randn(3, 8)]
    options: dict[str, Any] = {"per_channel": per_channel, "progress": False}
    here = calibrate(model(), batches, observer, **options)
    there = calibrate(model().to(GPU), [x.to(GPU) for x in batches], observer, **options)
    for name, expected in here.items():
        assert torch.equal(expected.lo, there[name].lo) and torch.equal(expected.hi, there[name].hi)


def test_the_report_without_float64(no_float64: None) -> None:
    batch = torch.randn(9, 8)
    expected = range_report(model(), [batch], progress=False)
    assert range_report(model().to(GPU), [batch.to(GPU)], progress=False)[0] == expected[0]
