"""The peers: how each makes its INT8 (or 4-bit) form of one nn.Linear and of one BERT, in its best known way.

Every builder gets fp32 and returns what its user would call: fp32 in, fp32 out. A package that is not installed is
reported by name (`choose`), a builder that raises is reported with its reason (common.Runner).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LinearCall = Callable[[Tensor], Any]
ModelCall = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[nn.Module], nn.Module]  # changes a module in place and returns it


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to run: `call(ids, mask)` gives the last hidden state; `size` is its bytes when saved."""

    call: ModelCall
    size: int


@dataclass(frozen=True)
class Affine:
    """Quantize x (fp32) to int8, or dequantize q; scale and zero_point are [1] for a whole tensor (axis None)."""

    x: Tensor
    q: Tensor
    scale: Tensor  # fp32
    zero_point: Tensor  # int32
    axis: int | None
    inverse: bool  # dequantize


ModelBuilder = Callable[[nn.Module, int, Sequence[Tensor]], BuiltModel]  # (model, threads, ids to calibrate on)
AffineBuilder = Callable[[Affine, int], Callable[[], Any]]  # (problem, threads)


@dataclass(frozen=True)
class Peer:
    name: str  # on the command line
    title: str  # in tables
    packages: tuple[str, ...]  # as imported
    linear: Callable[[nn.Linear, int, int], Sequence[LinearCall]] | None  # (linear, copies, threads)
    model: ModelBuilder | None
    affine: AffineBuilder | None = None


# ---- torch ----------------------------------------------------------------------------------------------------------


def _torch_linear(transform: Transform, linear: nn.Linear, copies: int, _threads: int) -> list[LinearCall]:
    if transform is _torchao_compiled and copies > 1:
        raise ValueError(f"{copies} copies would be compiled one by one, and TorchDynamo stops at 8")
    return [transform(nn.Sequential(copy.deepcopy(linear)))[0] for _ in range(copies)]  # type: ignore[index]


def _torch_model(transform: Transform, model: nn.Module, _threads: int, _sentences: Sequence[Tensor]) -> BuiltModel:
    changed = transform(copy.deepcopy(model))

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        state: Tensor = changed(input_ids=ids, attention_mask=mask).last_hidden_state
        return state

    return BuiltModel(call, saved_size(changed))


def _torch_peer(
    name: str, title: str, transform: Transform, *packages: str, affine: AffineBuilder | None = None
) -> Peer:
    linear, model = functools.partial(_torch_linear, transform), functools.partial(_torch_model, transform)
    return Peer(name, title, packages, linear, model, affine)


def saved_size(model: nn.Module) -> int:
    """Bytes of the model's state_dict as torch.save writes it."""

    class Counter:
        size = 0

        def write(self, data: bytes) -> int:
            self.size += len(data)
            return len(data)

        def flush(self) -> None: ...

    counter = Counter()
    torch.save(model.state_dict(), counter)  # type: ignore[arg-type]
    return counter.size


def _fp32(model: nn.Module) -> nn.Module:
    return model


def _quantize_dynamic(engine: str, model: nn.Module) -> nn.Module:
    torch.backends.quantized.engine = engine
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return quantized


def _pyqkern(scheme: str, model: nn.Module) -> nn.Module:
    import pyqkern

    quantized: nn.Module = pyqkern.replace_linear(model, scheme)
    return quantized


def _pyqkern_optimize(scheme: str, model: nn.Module) -> nn.Module:
    import pyqkern

    optimized: nn.Module = pyqkern.optimize(model, scheme)
    return optimized


def _torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _torchao_compiled(model: nn.Module) -> nn.Module:
    quantized = _torchao(model)
    quantized.compile(dynamic=False)
    return quantized


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def _bitsandbytes(scheme: str, model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    def convert(linear: nn.Linear) -> nn.Module:
        k, n, bias = linear.in_features, linear.out_features, linear.bias is not None
        new: Any
        if scheme == "nf4":
            new = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=linear.weight.dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        if bias:
            new.bias = linear.bias
        moved: nn.Module = new.to("cpu").eval()
        return moved

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, convert(child))
    return model


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------


def _onnxruntime_session(model: str | bytes, threads: int, copies: int = 1) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if copies > 1 and threads > 1:  # many sessions would otherwise hold a spinning pool each
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


OnnxNode = tuple[str, list[str], str, dict[str, Any]]  # operator, inputs, output, attributes


def _onnx_graph(nodes: Sequence[OnnxNode], constants: Sequence[Any], source: int, result: int, rank: int) -> Any:
    """An ONNX model from "x" of element type `source` to "y" of type `result`, both of any shape of this rank."""
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node(operator, inputs, [output], **attributes) for operator, inputs, output, attributes in nodes],
        "benchmark",
        [helper.make_tensor_value_info("x", source, [None] * rank)],
        [helper.make_tensor_value_info("y", result, [None] * rank)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _onnxruntime_linear(linear: nn.Linear, copies: int, threads: int) -> list[LinearCall]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weight, bias = linear.weight.detach().t().contiguous().numpy(), linear.bias.detach().numpy()
    constants = [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")]
    nodes: list[OnnxNode] = [("MatMul", ["x", "w"], "xw", {}), ("Add", ["xw", "b"], "y", {})]
    float_type = onnx.TensorProto.FLOAT
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(_onnx_graph(nodes, constants, float_type, float_type, 2), str(plain))
        quantize_dynamic(plain, quantized, weight_type=QuantType.QInt8, per_channel=True)
        sessions = [_onnxruntime_session(str(quantized), threads, copies) for _ in range(copies)]
    return [lambda x, run=session.run: run(None, {"x": x.numpy()})[0] for session in sessions]  # type: ignore[misc]


def _export_onnx(model: nn.Module, path: Path) -> None:
    """The model as ONNX with ids and mask of any batch and length in, the last hidden state out."""

    class LastHiddenState(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            state: Tensor = self.inner(input_ids=ids, attention_mask=mask).last_hidden_state
            return state

    model = copy.deepcopy(model)
    config: Any = model.config
    config._attn_implementation = "eager"  # the form that both runtimes' optimizers recognise
    example = torch.ones(2, 16, dtype=torch.long)
    axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask", "y")}
    torch.onnx.export(
        LastHiddenState(model), (example, example), str(path), input_names=["ids", "mask"], output_names=["y"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def _onnxruntime_model(model: nn.Module, threads: int, _sentences: Sequence[Tensor]) -> BuiltModel:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers import optimizer

    config: Any = model.config
    with tempfile.TemporaryDirectory() as folder:
        steps = ("plain", "shaped", "int8", "fused")
        plain, shaped, quantized, fused = (Path(folder) / f"{step}.onnx" for step in steps)
        _export_onnx(model, plain)
        quant_pre_process(str(plain), str(shaped), skip_symbolic_shape=True)
        quantize_dynamic(shaped, quantized, weight_type=QuantType.QInt8, per_channel=True)
        optimizer.optimize_model(
            str(quantized), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
        ).save_model_to_file(str(fused))
        session, size = _onnxruntime_session(str(fused), threads), fused.stat().st_size

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    return BuiltModel(call, size)


# ---- OpenVINO -------------------------------------------------------------------------------------------------------


def _openvino_model(model: nn.Module, threads: int, sentences: Sequence[Tensor]) -> BuiltModel:
    import nncf
    import openvino

    dataset = nncf.Dataset(sentences, lambda ids: {"ids": ids.numpy(), "mask": torch.ones_like(ids).numpy()})
    with tempfile.TemporaryDirectory() as folder:
        plain, saved = Path(folder) / "plain.onnx", Path(folder) / "int8.xml"
        _export_onnx(model, plain)
        quantized = nncf.quantize(
            openvino.convert_model(plain), dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(sentences)
        )
        openvino.save_model(quantized, saved)
        size = saved.stat().st_size + saved.with_suffix(".bin").stat().st_size
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({"ids": ids.numpy(), "mask": mask.numpy()})["y"])

    return BuiltModel(call, size)


# ---- affine quantize and dequantize: each builder gives a call without arguments -------------------------------------


def _pyqkern_affine(p: Affine, _threads: int) -> Callable[[], Tensor]:
    import pyqkern

    call = pyqkern.dequantize_affine if p.inverse else pyqkern.quantize_affine
    data = p.q if p.inverse else p.x
    if p.axis is None:
        return functools.partial(call, data, float(p.scale), int(p.zero_point))
    return functools.partial(call, data, p.scale, p.zero_point, axis=p.axis)


def _torch_affine(p: Affine, _threads: int) -> Callable[[], Tensor]:
    if p.axis is None:
        scale, zero_point = float(p.scale), int(p.zero_point)
        if p.inverse:
            return torch._make_per_tensor_quantized_tensor(p.q, scale, zero_point).dequantize
        return functools.partial(torch.quantize_per_tensor, p.x, scale, zero_point, torch.qint8)
    if p.inverse:
        return torch._make_per_channel_quantized_tensor(p.q, p.scale, p.zero_point, p.axis).dequantize
    return functools.partial(torch.quantize_per_channel, p.x, p.scale, p.zero_point, p.axis, torch.qint8)


def _torchao_affine(p: Affine, _threads: int) -> Callable[[], Tensor]:
    from torchao.quantization import quant_primitives

    block = tuple(1 if axis == p.axis else size for axis, size in enumerate(p.x.shape))
    if p.inverse:
        return functools.partial(quant_primitives.dequantize_affine, p.q, block, p.scale, p.zero_point, torch.int8)
    return functools.partial(quant_primitives.quantize_affine, p.x, block, p.scale, p.zero_point, torch.int8)


def _onnxruntime_affine(p: Affine, threads: int) -> Callable[[], Any]:
    from onnx import TensorProto, numpy_helper

    source, result = (TensorProto.INT8, TensorProto.FLOAT) if p.inverse else (TensorProto.FLOAT, TensorProto.INT8)
    scale, zero_point = p.scale, p.zero_point.to(torch.int8)
    if p.axis is None:
        scale, zero_point = scale[0], zero_point[0]
    constants = [numpy_helper.from_array(scale.numpy(), "s"), numpy_helper.from_array(zero_point.numpy(), "z")]
    operator = "DequantizeLinear" if p.inverse else "QuantizeLinear"
    nodes = [(operator, ["x", "s", "z"], "y", {"axis": p.axis or 0})]
    model = _onnx_graph(nodes, constants, source, result, p.x.dim())
    session = _onnxruntime_session(model.SerializeToString(), threads)
    data = (p.q if p.inverse else p.x).numpy()
    return lambda: session.run(None, {"x": data})[0]


def own(name: str, scheme: str = "int8") -> Peer:
    """pyqkern itself: "pyqkern.optimize" for models, "pyqkern" for all."""
    if name == "pyqkern.optimize":
        model = functools.partial(_torch_model, functools.partial(_pyqkern_optimize, scheme))
        return Peer(name, name, ("pyqkern",), None, model)
    return _torch_peer(name, name, functools.partial(_pyqkern, scheme), "pyqkern", affine=_pyqkern_affine)


# ---- the list -------------------------------------------------------------------------------------------------------

PEERS = (
    own("pyqkern.optimize"),
    own("pyqkern"),
    Peer("torch", "torch", (), None, None, _torch_affine),
    _torch_peer("fp32", "torch fp32", _fp32),
    _torch_peer("fbgemm", "torch fbgemm", functools.partial(_quantize_dynamic, "fbgemm")),
    _torch_peer("onednn", "torch onednn", functools.partial(_quantize_dynamic, "onednn")),
    Peer("ort", "ONNX Runtime", ("onnxruntime", "onnx"), _onnxruntime_linear, _onnxruntime_model, _onnxruntime_affine),
    _torch_peer("torchao", "torchao", _torchao, "torchao", affine=_torchao_affine),
    _torch_peer("torchao-compiled", "torchao compiled", _torchao_compiled, "torchao"),
    _torch_peer("bnb-int8", "bitsandbytes INT8", functools.partial(_bitsandbytes, "int8"), "bitsandbytes"),
    _torch_peer("bnb-nf4", "bitsandbytes NF4", functools.partial(_bitsandbytes, "nf4"), "bitsandbytes"),
    Peer("openvino", "OpenVINO", ("openvino", "nncf", "onnx"), None, _openvino_model),
)

#: The peers that come with torch and are therefore always there.
TORCH = ("torch", "fp32", "fbgemm", "onednn")

BY_NAME = {peer.name: peer for peer in PEERS}


def not_installed(packages: Sequence[str]) -> str | None:
    """What a table says of a peer that lacks one of these packages; None where all are here."""
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def choose(wanted: Sequence[str], kind: str) -> tuple[list[Peer], dict[str, str]]:
    """The wanted peers that have a builder of this `kind` ("linear", "model" or "affine") and are installed here.

    The second value names each that is not installed, with the package it lacks.
    """
    chosen, missing = [], {}
    for peer in PEERS:
        if peer.name not in wanted or getattr(peer, kind) is None:
            continue
        if why := not_installed(peer.packages):
            missing[peer.title] = why
        else:
            chosen.append(peer)
    return chosen, missing


#: What oneDNN, FBGEMM and torch's own loops read at their first use; ONNX Runtime and OpenVINO have no such switch.
HELD_TO_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
}  # fmt: skip


def hold(isas: Sequence[str]) -> None:
    """--isa avx2 on a CPU that has more holds the peers that can be held to it too, here and in processes to come."""
    import pyqkern

    if list(isas) == ["avx2"] and pyqkern.isas()[0] != "avx2":
        os.environ.update(HELD_TO_AVX2)
        print("held to AVX2: fbgemm, onednn, torch; not held, since they have no switch: ONNX Runtime, OpenVINO")


def quiet() -> None:
    """Keeps the peers' warnings (some come with every call, and cost time) out of the measurement."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
