"""Quantized LSTM, GRU and RNN, and their cells: what nn.LSTM and the others take and return.

Weights are QLinears without a call of their own: one for the input and one for the hidden state of each layer and
direction, whose products and gates are one operator, `torch.ops.pyqkern.recurrent`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pyqkern.backends import GATES
from pyqkern.nn.four_bit import NESTED, Linear4bit
from pyqkern.nn.linear import QLinear, as_linear, to_trained
from pyqkern.ops.checks import INT, check_float
from pyqkern.schemes import SCHEMES, Float16, Int8, Scheme, check_type, get_scheme

# How a layer is computed: the cell of the operator, whether backwards in time, batch_sizes.
How = tuple[str, bool, Tensor | None]


class QRecurrent(nn.Module):
    """What every quantized recurrent layer and cell is an instance of.

    Made by `QRecurrent.from_recurrent(module, scheme)` or by `replace_recurrent`; or empty by a subclass's constructor,
    which takes what that of torch takes and a scheme, to load a state_dict into. All is computed in fp32; outputs and
    states have the input's dtype, fp32, bf16 or fp16. A result does not depend on what else is in the batch.

    state_dict: torch's names, `weight_ih_l0` int8 with `weight_ih_l0_scale` beside it (4 bits: `weight_ih_l0_absmax`),
    `bias_ih_l0`. These names are attributes too; a weight is then a dequantized copy.

    Gradients go straight through the quantizations, to the input, the initial states and the biases.
    """

    _classes: ClassVar[dict[type[nn.Module], type["QRecurrent"]]] = {}
    _options: ClassVar[tuple[str, ...]]  # attributes of torch's module that are arguments of its constructor

    input_size: int
    hidden_size: int
    bias: bool
    scheme: Scheme
    mode: str  # of the operator's cells
    proj_size: int = 0

    def __init_subclass__(cls, of: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if of is not None:
            QRecurrent._classes[of] = cls

    @staticmethod
    def from_recurrent(module: nn.Module, scheme: str | Scheme = "int8") -> "QRecurrent":
        """A quantized copy of an nn.LSTM, GRU, RNN or a cell of these, on its device; biases are the same Parameters.

        scheme: "int8", "int8-a7", "nf4", "fp4", "int4", "float16", or a scheme object of these; 4 bits with compute
        "auto", "int8" or "fp32". Raises TypeError for other modules and dtypes, ValueError for other schemes and for
        NaN or an infinity in a weight.
        """
        kind = next((cls for of, cls in QRecurrent._classes.items() if isinstance(module, of)), None)
        if kind is None:
            names = ", ".join(of.__name__ for of in QRecurrent._classes)
            raise TypeError(f"module must be one of {names}, got {type(module).__name__}")
        scheme = check_recurrent_scheme(scheme)
        with torch.inference_mode(False), torch.no_grad():
            self = QRecurrent.like(module, scheme)
            for name, empty in self._linears():
                quantized = QLinear.from_linear(as_linear(getattr(module, f"weight_{name}")), scheme)
                quantized.bias = getattr(module, f"bias_{name}") if empty.bias is not None else None
                self._modules[name] = quantized
        return self.train(module.training)

    @staticmethod
    def like(module: nn.Module, scheme: Scheme, dtype: torch.dtype | None = None) -> "QRecurrent":
        """An empty one for a layer or cell of torch, on the meta device, to load a state_dict into with assign=True."""
        kind = next(cls for of, cls in QRecurrent._classes.items() if isinstance(module, of))
        options = {name: getattr(module, name) for name in kind._options}
        return kind(**options, scheme=scheme, device="meta", dtype=dtype)

    def in_float(self) -> nn.Module:
        """The layer of torch with the dequantized weights."""
        of = next(of for of, kind in QRecurrent._classes.items() if kind is type(self))
        module = of(**{name: getattr(self, name) for name in self._options}, device="meta").train(self.training)
        for name, linear in self._linears():
            setattr(module, f"weight_{name}", nn.Parameter(linear.weight.clone()))
            if linear.bias is not None:
                setattr(module, f"bias_{name}", linear.bias)
        return module

    def _make(self, name: str, k: int, n: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        make: Any = QLinear._classes[type(self.scheme)]
        self.add_module(name, make(k, n, bias, self.scheme, device, dtype))

    def _linears(self) -> Iterator[tuple[str, QLinear]]:
        for name, module in self._modules.items():
            assert isinstance(module, QLinear)
            yield name, module

    @property
    def dtype(self) -> torch.dtype:
        return next(self._linears())[1].dtype

    def _names(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """(torch's name, ours) of each key of the state_dict."""
        for name, linear in self._linears():
            for key in linear._expected():
                if key == "bias":
                    yield f"{prefix}bias_{name}", f"{prefix}{name}.bias"
                else:
                    suffix = "" if key == "weight" else "_" + key.removeprefix("weight_")
                    yield f"{prefix}weight_{name}{suffix}", f"{prefix}{name}.{key}"

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for theirs, ours in self._names(prefix):
            if ours in state:
                state[theirs] = state.pop(ours)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for theirs, ours in self._names(prefix):
            if theirs in state_dict:
                state_dict[ours] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """As those of its linears, under the names of the state_dict."""
        names = dict(self._names(prefix))
        ours = {name: state_dict[key] for key, name in names.items() if key in state_dict}
        problems = [one for name, linear in self._linears() for one in linear._load_problems(ours, f"{prefix}{name}.")]
        return [
            f"{key}{one.removeprefix(name)}"
            for one in problems
            for key, name in names.items()
            if one.startswith(f"{name} ")
        ]

    def _place(self, name: str) -> tuple[QLinear, str] | None:
        """The linear, and the key of its state_dict, that has what is in ours under `name`."""
        modules = self.__dict__.get("_modules", {})
        if modules and name.startswith(("weight_", "bias_")):
            for theirs, ours in self._names():
                if theirs == name:
                    linear, _, key = ours.partition(".")
                    return modules[linear], key
        return None

    def __getattr__(self, name: str) -> Any:
        place = self._place(name)
        if place is None:
            return super().__getattr__(name)
        linear, key = place
        return linear._plain(key) if key in linear._packed and key != "weight" else getattr(linear, key)

    def __setattr__(self, name: str, value: Any) -> None:
        place = self._place(name)
        if place is None:
            return super().__setattr__(name, value)
        linear, key = place
        if key in linear._packed and key != "weight":
            linear._buffers[linear._packed[key]] = linear._pack(key, value)
        elif key == "bias" and isinstance(value, Tensor):  # a Parameter, or what torch.func has in its place
            linear._parameters[key] = value  # type: ignore[assignment]
        else:
            setattr(linear, key, value)

    # ---- one direction of a layer

    def _direction(self, names: Sequence[str], x: Tensor, h: Tensor, c: Tensor | None, how: How) -> tuple[Tensor, ...]:
        """x fp32 [steps, batch, K], or packed; h, c fp32 -> the outputs, and h and c in the end."""
        linears: list[Any] = [self._modules[name] for name in names]
        biases = [linear._parameters["bias"] for linear in linears[:2]] if self.bias else []
        trained = [linear.trained for linear in linears]
        given = [t for t in (x, h, c, *biases, *trained) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            two = biases or (None, None)
            result: tuple[Tensor, ...] = _StraightThrough.apply(x, h, c, *two, linears, how, *trained)
            return result
        return _operator(x, h, c, biases, linears, how)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)}" for name in self._options if name != "bias")
        return f"{options}, bias={self.bias}, scheme={self.scheme.name}"


def check_recurrent_scheme(scheme: str | Scheme) -> Scheme:
    scheme = get_scheme(scheme)
    if not scheme.recurs:
        names = ", ".join(repr(name) for name, one in SCHEMES.items() if one.recurs)
        why = (
            "; it takes the range of each step as it comes, and needs none of calibrate" if scheme.needs_ranges else ""
        )
        raise ValueError(f"scheme of a recurrent layer must be one of {names}, got {scheme.name!r}{why}")
    if not is_recurrent_scheme(scheme):
        raise ValueError('compute must be "auto", "int8" or "fp32" for a recurrent layer, got "bf16"')
    return scheme


def is_recurrent_scheme(scheme: Scheme) -> bool:
    """Whether a recurrent layer can be quantized so."""
    return scheme.recurs and getattr(scheme, "compute", "auto") != "bf16"


def _arguments(biases: Sequence[Tensor], linears: Sequence[Any], how: How) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of the operator, those between batch_sizes and h, and those behind c."""
    scheme = linears[0].scheme
    weights = [linear._buffers["packed"] for linear in linears]
    fp32 = [bias.float() for bias in biases]
    scales = [linear._scales() for linear in linears]
    if isinstance(scheme, Int8):
        return (weights, scales, fp32), (*how[:2], scheme.symmetric, scheme.activation_bits)
    assert isinstance(linears[0], Linear4bit)
    nested = [linear._buffers[name] for linear in linears for name in NESTED if linear.double_quant]
    rest = (False, 8, linears[0].quant_type, linears[0].blocksize, nested, scheme.compute)
    return (weights, scales, fp32), (*how[:2], *rest)


def _operator(
    x: Tensor, h: Tensor, c: Tensor | None, biases: Sequence[Tensor], linears: Sequence[Any], how: How
) -> tuple[Tensor, ...]:
    before, behind = _arguments(biases, linears, how)
    result: tuple[Tensor, ...] = torch.ops.pyqkern.recurrent.default(x, how[2], *before, h, c, *behind)
    return result


class _StraightThrough(torch.autograd.Function):
    """One direction in grad mode: the quantizations count as the identity. See `reference.recurrent.backward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor | None, bias: Tensor | None, bias_h: Tensor | None,
        linears: Sequence[Any], how: How, *trained: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        biases = [one for one in (bias, bias_h) if one is not None]
        y, h_n, c_n = _operator(x, h, c, biases, linears, how)
        ctx.linears, ctx.how, ctx.has_c = linears, how, c is not None
        ctx.save_for_backward(x, h, y, *(() if c is None else (c,)), *biases)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        x, h, y, *saved = ctx.saved_tensors
        c = saved.pop(0) if ctx.has_c else None
        before, behind = _arguments(saved, ctx.linears, ctx.how)
        values = [linear._dequantize().float() for linear in ctx.linears]
        to_x, to_h, to_c, *to_biases, of_weights = torch.ops.pyqkern.recurrent_backward.default(
            grad_y, grad_h, grad_c, y, values, x, ctx.how[2], *before, h, c, *behind
        )
        to_biases = [grad.to(bias.dtype) for grad, bias in zip(to_biases, saved, strict=False)] or [None, None]
        to_c = to_c if ctx.has_c else None
        of_x, of_h, before, *projected = of_weights
        grads, rows = (of_x, of_h, *projected[:1]), (x.reshape(-1, x.shape[-1]), before, *projected[1:])
        return to_x, to_h, to_c, *to_biases, None, None, *to_trained(ctx.linears, grads, rows)


# ---- layers


class QRecurrentLayer(QRecurrent):
    """What the three have in common: layers, directions, and the forms of input and output."""

    _options: ClassVar[tuple[str, ...]] = (
        "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
    )  # fmt: skip

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        scheme: str | Scheme = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            check_type(name, value, INT, "an int")
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size must be within [0, hidden_size={hidden_size}), got {proj_size}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size, self.scheme = bidirectional, proj_size, check_recurrent_scheme(scheme)
        state, gates = proj_size or hidden_size, GATES[self.mode] * hidden_size
        for layer in range(num_layers):
            for suffix in self._suffixes():
                k = input_size if layer == 0 else state * (1 + bidirectional)
                self._make(f"ih_l{layer}{suffix}", k, gates, bias, device, dtype)
                self._make(f"hh_l{layer}{suffix}", state, gates, bias, device, dtype)
                if proj_size:
                    self._make(f"hr_l{layer}{suffix}", hidden_size, proj_size, False, device, dtype)

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def flatten_parameters(self) -> None:
        """Nothing: the weights lie as the kernels take them. nn.LSTM has it."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As nn.LSTM, nn.GRU and nn.RNN: input [steps, batch, input_size] (batch first where batch_first is set),
        [steps, input_size], or a PackedSequence; hx the initial states, zeros where they are missing.

        Raises ValueError for other shapes and for no steps, TypeError for dtypes.
        """
        if isinstance(self.scheme, Float16):
            return self.in_float()(input, hx)
        packed = input if isinstance(input, PackedSequence) else None
        x: Any = input if packed is None else packed.data
        check_type("input", x, Tensor, "a tensor or a PackedSequence")
        check_float("input", x.dtype)
        if x.dim() not in ((2, 3) if packed is None else (2,)) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"input must be [steps, batch, input_size={self.input_size}], or [steps, input_size] without a batch, "
                f"got shape {list(x.shape)}"
            )
        dtype, is_batched = x.dtype, packed is not None or x.dim() == 3
        sizes, order, back = (None, None, None) if packed is None else packed[1:]
        if packed is None:
            x = x if is_batched else x.unsqueeze(1)
            x = x.transpose(0, 1) if self.batch_first and is_batched else x
        if not x.shape[0]:
            raise ValueError("input must have at least one step, got none; leave empty sequences out")
        batch = x.shape[1] if packed is None else int(packed.batch_sizes[0])
        h, c = self._states(hx, batch, is_batched, x, order)
        y, h, c = self._layers(x.float(), h, c, sizes)
        states = [s.to(dtype) if back is None else s.to(dtype).index_select(1, back) for s in (h, c) if s is not None]
        if packed is not None:
            return PackedSequence(y.to(dtype), *packed[1:]), self._as_hx(states)
        y = y.to(dtype).transpose(0, 1) if self.batch_first and is_batched else y.to(dtype)
        if not is_batched:
            y, states = y.squeeze(1), [state.squeeze(1) for state in states]
        return y, self._as_hx(states)

    def _as_hx(self, states: Sequence[Tensor]) -> Any:
        return tuple(states) if self.mode == "lstm" else states[0]

    def _states(
        self, hx: Any, batch: int, is_batched: bool, x: Tensor, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """h and c, fp32 [layers * directions, batch, size], in the order of the packed sequences."""
        rows = self.num_layers * len(self._suffixes())
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "lstm" else 1]
        if hx is None:
            states = [x.new_zeros((rows, batch, width), dtype=torch.float32) for width in widths]
            return states[0], states[1] if len(states) == 2 else None
        given = tuple(hx) if self.mode == "lstm" and isinstance(hx, tuple | list) else (hx,)
        if len(given) != len(widths) or not all(isinstance(one, Tensor) for one in given):
            what = "a pair (h_0, c_0)" if self.mode == "lstm" else "a tensor"
            raise TypeError(f"hx must be {what}, got {type(hx).__name__}")
        states = []
        for name, state, width in zip(("h_0", "c_0"), given, widths, strict=False):
            check_float(name, state.dtype)
            wanted = (rows, batch, width) if is_batched else (rows, width)
            if tuple(state.shape) != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got {list(state.shape)}")
            state = (state if is_batched else state.unsqueeze(1)).float()
            states.append(state if order is None else state.index_select(1, order))
        return states[0], states[1] if len(states) == 2 else None

    def _layers(
        self, x: Tensor, h: Tensor, c: Tensor | None, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        suffixes, ends = self._suffixes(), []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = nn.functional.dropout(x, self.dropout)
            outputs = []
            for i, suffix in enumerate(suffixes):
                at = layer * len(suffixes) + i
                names = [f"{kind}_l{layer}{suffix}" for kind in ("ih", "hh", "hr")[: 3 if self.proj_size else 2]]
                y, *end = self._direction(names, x, h[at], None if c is None else c[at], (self.mode, i == 1, sizes))
                outputs.append(y)
                ends.append(end)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        h_n, c_n = (torch.stack([end[k] for end in ends]) for k in (0, 1))
        return x, h_n, None if c is None else c_n


class QLSTM(QRecurrentLayer, of=nn.LSTM):
    """An nn.LSTM with quantized weights; input, output and states as there.

    >>> import torch, pyqkern
    >>> layer = pyqkern.QLSTM.from_recurrent(torch.nn.LSTM(40, 32, batch_first=True))
    >>> y, (h, c) = layer(torch.randn(2, 7, 40))
    >>> y.shape, layer.state_dict()["weight_ih_l0"].dtype
    (torch.Size([2, 7, 32]), torch.int8)
    """

    mode = "lstm"
    _options = (*QRecurrentLayer._options, "proj_size")


class QGRU(QRecurrentLayer, of=nn.GRU):
    """An nn.GRU with quantized weights; input, output and state as there."""

    mode = "gru"


class QRNN(QRecurrentLayer, of=nn.RNN):
    """An nn.RNN with quantized weights; input, output and state as there. nonlinearity: "tanh" or "relu"."""

    _options = (*QRecurrentLayer._options, "nonlinearity")

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> None:
        self.mode, self.nonlinearity = _rnn_mode(nonlinearity), nonlinearity
        super().__init__(*args, **kwargs)


def _rnn_mode(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
    return f"rnn_{nonlinearity}"


# ---- cells


class QRecurrentCell(QRecurrent):
    """What the three have in common: one step."""

    _options: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        scheme: str | Scheme = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            check_type(name, value, INT, "an int")
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.scheme = check_recurrent_scheme(scheme)
        self._make("ih", input_size, GATES[self.mode] * hidden_size, bias, device, dtype)
        self._make("hh", hidden_size, GATES[self.mode] * hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the cell of torch: input [batch, input_size] or [input_size]; hx the state, zeros where it is missing."""
        check_type("input", input, Tensor, "a tensor")
        if isinstance(self.scheme, Float16):
            return self.in_float()(input, hx)
        check_float("input", input.dtype)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(f"input must be [batch, input_size={self.input_size}], got shape {list(input.shape)}")
        is_lstm, is_batched = self.mode == "lstm", input.dim() == 2
        x = (input if is_batched else input.unsqueeze(0)).float()
        shape = (x.shape[0], self.hidden_size)
        if hx is None:
            hx = (x.new_zeros(shape),) * (1 + is_lstm)
        given = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if len(given) != 1 + is_lstm or not all(isinstance(state, Tensor) for state in given):
            what = "a pair (h_0, c_0)" if is_lstm else "a tensor"
            raise TypeError(f"hx must be {what}, got {type(hx).__name__} of {len(given)}")
        for state in given:
            check_float("hx", state.dtype)
            if tuple(state.shape) != shape and (is_batched or tuple(state.shape) != shape[1:]):
                raise ValueError(f"hx must be {list(shape)}, got {list(state.shape)}")
        states = [state.reshape(shape).float() for state in given]
        c = states[1] if is_lstm else None
        _, h, c = self._direction(("ih", "hh"), x.unsqueeze(0), states[0], c, (self.mode, False, None))
        ends = [s.to(input.dtype) if is_batched else s.to(input.dtype).squeeze(0) for s in (h, c)[: 1 + is_lstm]]
        return tuple(ends) if is_lstm else ends[0]


class QLSTMCell(QRecurrentCell, of=nn.LSTMCell):
    """An nn.LSTMCell with quantized weights; input, output and states as there."""

    mode = "lstm"


class QGRUCell(QRecurrentCell, of=nn.GRUCell):
    """An nn.GRUCell with quantized weights; input, output and state as there."""

    mode = "gru"


class QRNNCell(QRecurrentCell, of=nn.RNNCell):
    """An nn.RNNCell with quantized weights; input, output and state as there. nonlinearity: "tanh" or "relu"."""

    _options = (*QRecurrentCell._options, "nonlinearity")

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> None:
        self.mode, self.nonlinearity = _rnn_mode(nonlinearity), nonlinearity
        super().__init__(*args, **kwargs)
