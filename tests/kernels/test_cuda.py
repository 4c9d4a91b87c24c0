"""Operators, modules and models on CUDA, down to the Triton kernels: on the GPU, or on a simulated one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from calls import CALLS
from simulated_cuda import simulated_cuda
from strategies import FLOATS, floats, integers
from torch import Tensor, nn
from triton_device import INTERPRETED, require_device, same

import pyqkern
from pyqkern import QExperts, QLinear, QRecurrent, optim, replace_embedding, replace_linear, smooth
from pyqkern.analysis import error_propagation, range_report, sensitivity
from pyqkern.backends import cpu
from pyqkern.calibration.observers import OBSERVERS
from pyqkern.schemes import FP4, NF4, Int4, Int8, Int8Outlier, Int8Static

GPU = torch.device("cuda", 0)
ops = torch.ops.pyqkern


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    require_device()
    if INTERPRETED:
        with simulated_cuda():
            yield
    else:
        yield


# Which argument is a weight in the form that each device has for itself, and what makes it from the CPU's.
PACKED = {
    "int8_unpack": 0,
    "int8_linear": 1,
    "int8_linear_static": 1,
    "int8_linear_outlier": 1,
    "int8_linear_weight_only": 1,
    "int8_grad_input": 1,
    "int8_embedding": 1,
    "unpack_4bit": 0,
    "linear_4bit": 1,
    "grad_input_4bit": 1,
    "embedding_4bit": 1,
}


def moved(name: str, arguments: tuple[object, ...]) -> list[object]:
    """The arguments on the GPU, weights packed for it."""
    there = [a.to(GPU) if isinstance(a, Tensor) else a for a in arguments]
    if name not in PACKED:
        return there
    at = PACKED[name]
    if "4bit" in name:
        n, k, blocksize = 40, 128, 64  # of support/calls.py
        there[at] = ops.pack_4bit(ops.unpack_4bit(arguments[at], n, k, blocksize).to(GPU), n, k, blocksize)
        if name != "unpack_4bit":
            there[at + 1] = cpu.unpack_scales(arguments[at + 1], n, k, blocksize).to(GPU)
    else:
        k = 96 if arguments[at].shape == cpu.packed_shape(40, 96) else 256
        there[at] = ops.int8_pack(ops.int8_unpack(arguments[at], 40, k).to(GPU))
    return there


EMBEDDINGS = {
    "int8_embedding": [
        (torch.tensor([[3, 39, 0], [3, 7, 1]]), CALLS["int8_unpack"][0][0], CALLS["int8_linear"][0][2], 96, dtype)
        for dtype in FLOATS
    ],
    "embedding_4bit": [
        (torch.tensor([5, 0, 39]), *CALLS["linear_4bit"][0][1:6], "nf4", 64, 40, 128, torch.bfloat16),
    ],
}
OPERATORS = CALLS | EMBEDDINGS


def test_every_operator_is_run_here() -> None:
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pyqkern::")}
    modules = {f"pyqkern::{name}{end}" for name in ("recurrent", "experts") for end in ("", "_backward")}  # below
    modules |= {"pyqkern::optimizer_step", "pyqkern::square_sum"}  # below
    modules |= {"pyqkern::encoder_layer", "pyqkern::decoder_layer"}  # for CPUs
    assert names == {f"pyqkern::{name}" for name in OPERATORS} | modules


@pytest.mark.parametrize("name, arguments", [(name, call) for name, calls in OPERATORS.items() for call in calls])
def test_an_operator_has_the_numbers_of_the_cpu(name: str, arguments: tuple[object, ...]) -> None:
    """Bit for bit, but where a GELU or a float product comes in: there each computes in its own order."""
    here = getattr(ops, name)(*arguments)
    there = getattr(ops, name)(*moved(name, arguments))
    pairs = list(zip(here, there, strict=True)) if isinstance(here, tuple) else [(here, there)]
    assert all(b.device == GPU and b.dtype == a.dtype for a, b in pairs)
    if name in ("int8_pack", "pack_4bit"):  # in a form of its own
        sizes = arguments[0].shape if name == "int8_pack" else arguments[1:]
        unpack = ops.int8_unpack if name == "int8_pack" else ops.unpack_4bit
        pairs = [(arguments[0], unpack(there, *sizes))]
    elif name == "int8_quantize_weight":
        sizes = arguments[0].shape
        pairs = [(ops.int8_unpack(here[0], *sizes), ops.int8_unpack(there[0], *sizes)), (here[1], there[1])]
    for a, b in pairs:
        assert a.shape == b.shape
        difference = (b.cpu().double() - a.double()).abs()
        assert difference.numel() == 0 or difference.max() <= largest_difference(name, arguments, a)


def largest_difference(name: str, arguments: tuple[object, ...], y: Tensor) -> float:
    top = float(y.double().abs().max())
    if name == "linear_4bit":
        # auto on a GPU: x and weights in bf16 or fp32; on the CPU: codes of 1/127 and levels of 1/32.
        x, scales = arguments[0].double(), arguments[2]
        k = x.shape[-1]
        return k * float(x.abs().max()) * float(scales.max()) * (2.0**-8 + 0.5 / 127 + 0.5 / 32)
    if name == "int8_linear_weight_only":
        # On a GPU weights are rounded to x's dtype first; each sum of k products is within (k + 1) * 2**-24 of exact.
        x, scales = arguments[0].double(), arguments[2]
        k, eps = x.shape[-1], torch.finfo(y.dtype).eps
        return k * float(x.abs().max()) * 127 * float(scales.max()) * (eps + 2 * (k + 1) * 2.0**-24) + eps * top
    if name in ("int8_grad_input", "grad_input_4bit"):
        # The same sums, of n products.
        grad, scales, greatest = arguments[0].double(), arguments[2], 127 if name == "int8_grad_input" else 1
        n, eps = grad.shape[-1], torch.finfo(y.dtype).eps
        return n * float(grad.abs().max()) * greatest * float(scales.max()) * (eps + 2 * (n + 1) * 2.0**-24) + eps * top
    fused = {"int8_linear": 4, "int8_linear_outlier": -1}
    if name == "int8_linear_outlier" or "gelu" in arguments:
        assert name != "int8_linear" or arguments[fused[name]] == "gelu"
        return max(torch.finfo(y.dtype).eps, 2.0**-20) * top
    return 0.0


def on_gpu(name: str, *arguments: object) -> Any:
    return getattr(ops, name)(*(a.to(GPU) if isinstance(a, Tensor) else a for a in arguments))


@pytest.mark.parametrize(("symmetric", "bits"), [(False, 8), (True, 8), (False, 7)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_operators_give_the_bits_of_the_cpu(dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    x, w = floats((2, 3, 70), 11, dtype), integers((33, 70), 12, torch.int8).clamp(min=-127)
    scale, bias = torch.rand(33) + 0.1, torch.randn(33)
    packed = on_gpu("int8_pack", w)
    same(on_gpu("int8_unpack", packed, 33, 70), w)
    how = (scale, bias, "relu", symmetric, bits)
    on_cpu = ops.int8_linear(x, ops.int8_pack(w), *how)
    same(on_gpu("int8_linear", x, packed, *how), on_cpu)
    how = (scale, bias, "relu", torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32), bits)
    on_cpu = ops.int8_linear_static(x, ops.int8_pack(w), *how)
    same(on_gpu("int8_linear_static", x, packed, *how), on_cpu)
    same(on_gpu("int8_matmul", w, w), ops.int8_matmul(w, w))
    for axis, group_size in ((None, None), ((0, 1), None), ((2,), None), ((2,), 35)):
        how = (axis, group_size)
        qparams = ops.choose_qparams_affine(x, torch.int8, *how, symmetric)
        for ours, theirs in zip(on_gpu("choose_qparams_affine", x, torch.int8, *how, symmetric), qparams, strict=True):
            same(ours, theirs)
        q = ops.quantize_affine(x, *qparams, *how, torch.int8)
        same(on_gpu("quantize_affine", x, *qparams, *how, torch.int8), q)
        y = ops.dequantize_affine(q, *qparams, *how, dtype)
        same(on_gpu("dequantize_affine", q, *qparams, *how, dtype), y)


# ---- modules


def static() -> Int8Static:
    return Int8Static(pyqkern.calibrate(nn.Sequential(linear()), [floats((8, 128), 3)]))


def linear(n: int = 40, k: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n)


MODULES = {
    "int8": lambda: QLinear.from_linear(linear()),
    "int8-a7": lambda: QLinear.from_linear(linear(), "int8-a7"),
    "int8, ragged": lambda: QLinear.from_linear(linear(33, 70)),
    "int8, symmetric, clipped": lambda: QLinear.from_linear(linear(), Int8(symmetric=True, clip_weights=True)),
    "int8-static": lambda: replace_linear(nn.Sequential(linear()), static())[0],
    "int8-weight-only": lambda: QLinear.from_linear(linear(), "int8-weight-only"),
    "int8-outlier": lambda: QLinear.from_linear(linear(), Int8Outlier(threshold=1.5)),
    "nf4": lambda: QLinear.from_linear(linear(), "nf4"),
    "nf4, nested": lambda: QLinear.from_linear(linear(), NF4(blocksize=32, double_quant=True)),
    "nf4, ragged": lambda: QLinear.from_linear(linear(33, 70), NF4(blocksize=32, double_quant=True)),
    "nf4, fp32": lambda: QLinear.from_linear(linear(), NF4(compute="fp32")),
    "fp4": lambda: QLinear.from_linear(linear(), FP4(blocksize=128, compute="bf16")),
    "int4": lambda: QLinear.from_linear(linear(), Int4(group_size=32)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def close(there: Tensor, here: Tensor, scheme: str) -> None:
    """What is bit for bit the CPU's, is; 4 bits go through other dtypes on a GPU, the rest through other sums."""
    assert there.device == GPU and there.dtype == here.dtype
    error, top = (there.cpu().double() - here.double()).abs().max(), here.double().abs().max()
    exact = scheme.split(",")[0] in ("int8", "int8-static")
    # 4 bits, relative to the largest output: bf16's 2**-9 of either operand, and on the CPU 1/254 of the activations
    # and 1/64 of the weights, whose codebook has 32 levels.
    assert error <= (0 if exact else (2 * 2.0**-9 + 1 / 254 + 1 / 64) * top if "4" in scheme else 1e-5 * top), scheme


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value.cpu(), wanted[key].cpu(), rtol=0, atol=0)


@each_module
@pytest.mark.parametrize("m", [1, 5, 70])
@torch.no_grad()
def test_a_module_moves_there_and_back(name: str, m: int) -> None:
    module = MODULES[name]().eval()
    before, x = state(module), floats((m, module.in_features), 2)
    here = module(x)
    module.to(GPU)
    assert all(t.device == GPU for t in (*module.parameters(), *module.buffers()))
    same_state(module, before)
    close(module(x.to(GPU)), here, name)
    close(module.weight, MODULES[name]().weight, "int8")
    assert torch.equal(module.to("cpu")(x), here)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_a_recurrent_layer_there_has_the_bits_of_the_cpu(kind: type[nn.Module]) -> None:
    """Its steps are plain torch around the device's linear."""
    torch.manual_seed(0)
    layer = QRecurrent.from_recurrent(kind(20, 24, 2, bidirectional=True))
    x = torch.randn(4, 3, 20)
    here = layer(x)[0]
    there = copy.deepcopy(layer).to(GPU)(x.to(GPU))[0]
    assert there.device == GPU and torch.equal(there.cpu(), here)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@torch.no_grad()
def test_experts_there_have_the_numbers_of_the_cpu(scheme: str) -> None:
    """INT8 bit for bit. 4 bits are computed with other dtypes there, and gradients come from sums in another order."""
    module = tiny.moe(intermediate_size=64, num_local_experts=3).model.layers[0].mlp.experts
    experts = QExperts.from_experts(module, scheme)
    index, weights = torch.tensor([[0, 1], [2, 0], [0, 2], [2, 3]]), torch.tensor([[0.7, 0.3]] * 4)
    given = (floats((4, 64), 1), index, weights)
    there, elsewhere = copy.deepcopy(experts).to(GPU), tuple(tensor.to(GPU) for tensor in given)
    y, here = there(*elsewhere), experts(*given)
    assert y.device == GPU and (y.cpu() - here).norm() <= (0 if scheme == "int8" else 0.05) * here.norm()
    grads = ops.experts_backward(torch.ones(4, 64), *given, *experts._arguments())
    grads_there = ops.experts_backward(torch.ones(4, 64).to(GPU), *elsewhere, *there._arguments())
    for a, b in zip(grads, grads_there, strict=True):
        assert b.device == GPU and (b.cpu() - a).norm() <= (1e-5 if scheme == "int8" else 0.05) * a.norm()


@each_module
def test_a_state_dict_of_one_device_loads_on_the_other(name: str) -> None:
    module, other = MODULES[name](), MODULES[name]()
    wanted = state(module)
    for tensor in other.state_dict().values():
        tensor.zero_()
    there = copy.deepcopy(module).to(GPU)
    other.load_state_dict(there.state_dict())  # from the GPU to the CPU
    same_state(other, wanted)
    for assign in (False, True):
        empty = MODULES[name]().to(GPU)
        empty.load_state_dict({key: torch.ones_like(value) for key, value in wanted.items()})
        empty.load_state_dict({key: value.to(GPU) for key, value in wanted.items()}, assign=assign)
        same_state(empty, wanted)
        x = floats((3, module.in_features), 4)
        with torch.no_grad():
            close(empty(x.to(GPU)), module(x), name)


@pytest.mark.parametrize("scheme", ["int8", Int8(symmetric=True), "nf4", NF4(double_quant=True), "fp4", "int4"])
def test_quantizing_there_gives_the_same_codes(scheme: object) -> None:
    here, there = QLinear.from_linear(linear(), scheme), QLinear.from_linear(linear().to(GPU), scheme)
    assert there.weight_scale.device == GPU if hasattr(there, "weight_scale") else there.absmax.device == GPU
    same_state(there, state(here))


@each_module
def test_an_input_elsewhere_is_refused(name: str) -> None:
    module = MODULES[name]()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"must be on cuda:0.*, got .*cpu|on the same device"):
            module(torch.zeros(2, module.in_features, device=GPU))
        with pytest.raises(ValueError, match=r"must be on .*cpu.*, got .*cuda:0|on one device|on the same device"):
            module.to(GPU)(torch.zeros(2, module.in_features))


# ---- models

IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return tiny.bert()


def hidden(model: nn.Module, device: torch.device | str = "cpu", **options: Tensor) -> Tensor:
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    with torch.no_grad():
        return model(IDS.to(device), attention_mask=mask.to(device))[0]


@pytest.mark.parametrize("scheme", ["int8", "nf4", "int8-outlier"])
def test_bert(bert: nn.Module, scheme: str) -> None:
    """Linears and embeddings; the CPU's and the GPU's model err alike."""
    exact = hidden(bert)
    model = replace_embedding(replace_linear(copy.deepcopy(bert), scheme), "int8")
    before, here = state(model), hidden(model)
    there = hidden(model.to(GPU), GPU)
    assert there.device == GPU
    assert (there.cpu() - exact).norm() <= 1.5 * (here - exact).norm()
    same_state(model, before)
    assert torch.equal(hidden(model.to("cpu")), here)


def test_an_optimized_model_goes_its_old_way_there(bert: nn.Module) -> None:
    exact, plain = hidden(bert), hidden(replace_linear(copy.deepcopy(bert)))
    model = pyqkern.optimize(copy.deepcopy(bert))
    here = hidden(model)
    there = hidden(model.to(GPU), GPU).cpu()
    assert (there - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert (there - exact).norm() < 1.5 * (here[0] - exact[0]).norm()
    assert torch.equal(hidden(model.to("cpu")), here)


def test_calibration_there_finds_the_same_ranges() -> None:
    """Of layers whose inputs are the same: a float linear before them has a sum of its own on each device."""
    model = nn.Sequential(linear(), nn.ReLU())
    batches = [floats((8, 128), seed) for seed in range(3)]
    for observer in OBSERVERS:
        here = pyqkern.calibrate(model, batches, observer=observer)
        there = pyqkern.calibrate(copy.deepcopy(model).to(GPU), [x.to(GPU) for x in batches], observer=observer)
        assert here == there, observer


def test_smoothing_and_analysis_run_there(bert: nn.Module, tmp_path: Path) -> None:
    """The same findings; scores and errors differ by the last bits of torch's own layers."""
    batch = {"input_ids": IDS}
    there_batch = {"input_ids": IDS.to(GPU)}
    here, there = copy.deepcopy(bert), copy.deepcopy(bert).to(GPU)
    smooth(here, pyqkern.calibrate(here, [batch], "minmax", per_channel=True))
    smooth(there, pyqkern.calibrate(there, [there_batch], "minmax", per_channel=True))
    torch.testing.assert_close(hidden(there, GPU).cpu(), hidden(here), rtol=1e-4, atol=1e-5)

    def propagation(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[str, float]]:
        quantized = replace_linear(copy.deepcopy(model))
        return [(r.name, r.sqnr) for r in error_propagation(model, quantized, [batch])]

    for ours, theirs in zip(propagation(here, batch), propagation(there, there_batch), strict=True):
        assert ours[0] == theirs[0] and math.isclose(ours[1], theirs[1], rel_tol=0, abs_tol=1)  # dB

    def score(model: nn.Module) -> float:
        device = next(model.parameters()).device
        return -float((hidden(model, device).cpu() - hidden(bert)).norm())

    file = tmp_path / "scores.jsonl"
    found = sensitivity(there, score, file=file)
    assert {r.name for r in found} == {r.name for r in sensitivity(here, score)}
    assert [r.drop for r in found] == [r.drop for r in sensitivity(there, score, file=file)]
    assert len(range_report(there, [there_batch])) == len(range_report(here, [batch]))


# ---- optimizers


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.SGD8bit, optim.Lion8bit])
def test_an_optimizer_has_the_bits_of_the_cpu(kind: type[optim.Optimizer8bit]) -> None:
    """In three steps, through codes and moments in fp32; NaN changes nothing."""
    here = [nn.Parameter(floats(size, 1)) for size in ((64, 65), (7,))]
    there = [nn.Parameter(p.detach().to(GPU)) for p in here]
    a, b = kind(here, lr=1e-2, weight_decay=0.1), kind(there, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for p, q in zip(here, there, strict=True):
            p.grad = floats(tuple(p.shape), 10 + step)
            q.grad = p.grad.to(GPU)
        a.step()
        b.step()
    for p, q in zip(here, there, strict=True):
        same(q.detach(), p.detach())
        for name, value in a.state[p].items():
            if isinstance(value, Tensor):
                same(b.state[q][name], value)
    there[1].grad = torch.full((7,), math.nan, device=GPU)
    with pytest.raises(ValueError, match="gradients must be finite"):
        b.step()
    same(there[0].detach(), here[0].detach())
