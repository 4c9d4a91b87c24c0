"""QExperts, the quantized experts of a mixture-of-experts layer, in the place of those of transformers 5.

transformers keeps the weights of all experts as two parameters, gate_up_proj [experts, 2 * intermediate, hidden] and
down_proj [experts, hidden, intermediate], and its classes declare how these are to be multiplied
(`use_experts_implementation`): by that, and by no table of names, it is told here which of them can be replaced. So
whatever implementation transformers was asked for, "eager", "grouped_mm" or "batched_mm", is not called.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.backends import GATE_ACTIVATIONS
from pyqkern.nn.four_bit import NESTED, Linear4bit
from pyqkern.nn.fused_parts import is_of_transformers, kernel_activation
from pyqkern.nn.linear import QLinear
from pyqkern.ops.experts import misfit
from pyqkern.schemes import FP4, NF4, Int4, Int8, Scheme, get_scheme

WEIGHTS = ("gate_up_proj", "down_proj")

_DECLARING = "transformers.integrations.moe"
_DECLARED = {
    "has_gate": True, "has_bias": False, "is_concatenated": True, "is_transposed": False,
    "has_post_expert_norm": False, "_is_expert_parallel": False,
}  # fmt: skip


class QExperts(nn.Module):
    """The quantized experts of a layer: (hidden_states [tokens, hidden], top_k_index, top_k_weights [tokens, k]) ->
    [tokens, hidden], as those of transformers 5 have it.

    Made by `QExperts.from_experts(module, scheme)` or by `replace_linear`. All is computed in fp32; the result has the
    dtype of hidden_states, fp32, bf16 or fp16. A token's result does not depend on the others.

    gate_up_proj, down_proj: QLinears without a call of their own, which hold the weights of all experts below each
    other, [experts * 2 * intermediate, hidden] and [experts * hidden, intermediate]. state_dict: theirs.

    Gradients go straight through the quantizations, to hidden_states and top_k_weights.
    """

    def __init__(self, gate_up_proj: QLinear, down_proj: QLinear, module: Any) -> None:
        """module: the float experts, of which all but the weights is kept."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.num_experts: int = module.num_experts
        self.hidden_dim = gate_up_proj.in_features
        self.intermediate_dim = down_proj.in_features
        activation = gate_activation(module)
        assert activation is not None
        self.activation = activation
        self.config = module.config
        shell = copy.copy(module)
        shell._parameters = dict.fromkeys(WEIGHTS)
        self._shell = [shell]  # in a list, so that it is no submodule
        self.train(module.training)

    @classmethod
    def from_experts(cls, module: nn.Module, scheme: str | Scheme = "int8") -> "QExperts":
        """A quantized copy of the experts of transformers, on their device.

        scheme: "int8", "int8-a7", "nf4", "fp4", "int4", or a scheme object of these. Raises ValueError with the reason
        for other schemes and experts, otherwise as QLinear.from_linear.
        """
        scheme = get_scheme(scheme)
        if reason := unsupported(module) or scheme_misfit(module, scheme):
            raise ValueError(f"experts must be such as can be quantized, but: {reason}")
        gate_up_proj, down_proj = (QLinear.from_linear(stacked(module._parameters[name]), scheme) for name in WEIGHTS)
        return cls(gate_up_proj, down_proj, module)

    def in_float(self) -> nn.Module:
        """The experts of transformers with the dequantized weights."""
        module: Any = copy.copy(self._shell[0])
        module._parameters = {}
        for name, linear in self.linears():
            weight = linear.weight.clone().unflatten(0, (self.num_experts, -1))
            module.register_parameter(name, nn.Parameter(weight))
        module.config = self.config
        module.train(self.training)
        return module

    def linears(self) -> Iterator[tuple[str, QLinear]]:
        for name in WEIGHTS:
            linear = self._modules[name]
            assert isinstance(linear, QLinear)
            yield name, linear

    @property
    def scheme(self) -> Scheme:
        return self.gate_up_proj.scheme

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up_proj.dtype

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Raises ValueError for shapes, TypeError for dtypes, IndexError for experts that there are not."""
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            result: Tensor = _StraightThrough.apply(hidden_states, top_k_weights, top_k_index, self)
            return result
        return self._experts(hidden_states, top_k_index, top_k_weights)

    def _experts(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = torch.ops.pyqkern.experts.default(x, index, weights, *self._arguments())
        return y

    def _arguments(self) -> tuple[Any, ...]:
        """Of the operator, those behind the tokens'."""
        linears: list[Any] = [linear for _, linear in self.linears()]
        scheme = linears[0].scheme
        sizes = (self.num_experts, self.intermediate_dim, self.activation)
        tensors = [[linear._buffers["packed"], linear._scales()] for linear in linears]
        if isinstance(scheme, Int8):
            return (*tensors, *sizes, scheme.symmetric, scheme.activation_bits)
        assert isinstance(linears[0], Linear4bit)
        if linears[0].double_quant:
            for of_linear, linear in zip(tensors, linears, strict=True):
                of_linear += [linear._buffers[name] for name in NESTED]
        return (*tensors, *sizes, False, 8, linears[0].quant_type, linears[0].blocksize, scheme.compute)

    def extra_repr(self) -> str:
        sizes = (self.num_experts, self.intermediate_dim, self.hidden_dim)
        return f"{'x'.join(map(str, sizes))}, activation={self.activation}, scheme={self.scheme.name}"


class _StraightThrough(torch.autograd.Function):
    """The experts in grad mode: the quantizations count as the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, index: Tensor, experts: QExperts) -> Tensor:
        ctx.save_for_backward(x, weights, index)
        ctx.experts = experts
        return experts._experts(x, index, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weights, index = ctx.saved_tensors
        rest = ctx.experts._arguments()
        to_x, to_weights = torch.ops.pyqkern.experts_backward.default(grad, x, index, weights, *rest)
        return to_x, to_weights, None, None


# ---- which experts can be quantized


def has_experts(module: nn.Module) -> bool:
    """Whether the module itself keeps the weights of several experts in one parameter, a class of any library."""
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


def unsupported(module: Any) -> str | None:
    """Why these experts cannot be replaced, whatever the scheme."""
    kind = type(module)
    if not has_experts(module) or any(module._parameters.get(name) is None for name in WEIGHTS):
        return f"{kind.__name__} does not keep its weights as gate_up_proj and down_proj"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    if not is_of_transformers(kind) or getattr(kind.forward, "__globals__", {}).get("__name__") != _DECLARING:
        return f"{kind.__name__} is no class that declares how its experts are multiplied, as transformers' own do"
    for name, value in _DECLARED.items():
        if vars(module).get(name, value) is not value:
            return f"{kind.__name__} multiplies its experts in another way: {name} is {vars(module)[name]}"
    if getattr(getattr(kind, "_apply_gate", None), "__module__", None) != _DECLARING:
        return f"{kind.__name__} has a gate of its own"
    if gate_activation(module) is None:
        return f"{kind.__name__} has an activation that the kernels have not: {module.act_fn}"
    (experts, rows, hidden), down = module.gate_up_proj.shape, module.down_proj.shape
    if tuple(down) != (experts, hidden, rows // 2) or module.num_experts != experts:
        return f"{kind.__name__} has weights of other shapes: {tuple(module.gate_up_proj.shape)} and {tuple(down)}"
    return None


def scheme_misfit(module: Any, scheme: Scheme) -> str | None:
    """Why the scheme cannot quantize experts that can be."""
    if not isinstance(scheme, Int8 | NF4 | FP4 | Int4):
        return f'experts are quantized to "int8", "int8-a7", "nf4", "fp4" or "int4", not to {scheme.name!r}'
    blocksize, double_quant = (0, False) if isinstance(scheme, Int8) else (scheme.blocksize, scheme.double_quant)
    for name in WEIGHTS:
        _, n, k = module._parameters[name].shape
        if why := misfit(n, k, blocksize, double_quant):
            return f"experts do not fit {scheme.name!r}: {why}"
    return None


def gate_activation(module: Any) -> str | None:
    """The operator's name for the activation of the gate; None where it has none."""
    name = kernel_activation(module.act_fn)
    return name if name in GATE_ACTIVATIONS else None


def stacked(weight: Any) -> nn.Linear:
    """A parameter [experts, n, k] as a linear [experts * n, k] that shares its memory."""
    linear = nn.Linear(weight.shape[2], weight.shape[0] * weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().flatten(0, 1), requires_grad=False)
    return linear
