"""QLinear, what every quantized linear is an instance of."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyqkern.backends import Kernels, Shape, reference
from pyqkern.nn.weight import DequantizedWeight, read_from
from pyqkern.ops.checks import FLOATS, INT, check_float
from pyqkern.ops.registry import BACKENDS, kernels_of
from pyqkern.schemes import Range, Scheme, check_type, get_scheme, ranges_for

Buffers = Mapping[str, Tensor | None]

PIECE = 1 << 20  # elements of the weight that `pieces` has dequantized at a time

# The codes of a layer before others were assigned without scales. torch.func.functional_call reads the weight, assigns
# a state_dict's, and assigns what it has read: these codes alone go back, since the scales that were read beside them
# may be the state_dict's. It also reads the weight that was given, and puts it into the caller's dict, to which scales
# belong as before: a weight that is read while somebody holds the codes before it stands for its codes alone.
_codes_before: WeakKeyDictionary[nn.Module, weakref.ref[Tensor]] = WeakKeyDictionary()


class QLinear(nn.Module):
    """A linear layer with quantized weights: y = x @ weight.T + bias, x [..., in_features] -> [..., out_features].

    Made by `QLinear.from_linear(linear, scheme)`, or empty by a subclass's constructor, to load a state_dict into.
    y has x's dtype (fp32, bf16 or fp16), or the autocast dtype. `weight` is a dequantized copy, made when asked for;
    `dtype` is that copy's, and follows `.to(dtype)`.

    `weight` can be assigned as a whole: floats [out_features, in_features] are quantized; the `weight` of a layer of
    the same scheme and shape ties the two, which then have the same codes; what the state_dict has under "weight" is
    taken as it is. Editing it in place raises RuntimeError, because the layer does not compute with the copy.

    A subclass says which scheme it implements, `class Int8Linear(QLinear, scheme=Int8)`, and provides `_quantized`,
    `_linear`, `_dequantize`, `rows`, `_of_weight`, and what loading and moving ask for: `_expected`,
    `_packed`, `_plain`, `_pack`, `_packed_shapes` and `_unpacked`. Its constructor takes what this one takes, on any
    device.

    >>> import torch, pyqkern
    >>> layer = pyqkern.QLinear.from_linear(torch.nn.Linear(64, 32), "int8")
    >>> layer(torch.randn(2, 64)).shape, layer.state_dict()["weight"].dtype
    (torch.Size([2, 32]), torch.int8)
    """

    _classes: ClassVar[dict[type[Scheme], type["QLinear"]]] = {}

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype
    bias: nn.Parameter | None
    trained: Tensor | None = None  # the float weight that a recurrent layer's gradient goes to

    def __init_subclass__(cls, scheme: type[Scheme] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if scheme is not None:
            QLinear._classes[scheme] = cls

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_type(name, size, INT, "an int")
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")
        if dtype is not None:
            check_float("dtype", dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.dtype = dtype or torch.get_default_dtype()
        values = torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    @classmethod
    def _own_scheme(cls, scheme: str | Scheme | None) -> Any:
        """The scheme of a constructor's argument, by default that which the class implements; ValueError for others."""
        kinds: dict[type, type[Scheme]] = {kind: of for of, kind in cls._classes.items()}
        own = next(kinds[kind] for kind in cls.__mro__ if kind in kinds)
        found = get_scheme(own.name if scheme is None else scheme)
        if not isinstance(found, own):
            raise ValueError(f"scheme of {cls.__name__} must be {own.name!r}, got {found.name!r}")
        return found

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str | Scheme = "int8", *, ranges: Mapping[str, Range] | None = None
    ) -> "QLinear":
        """A quantized copy of `linear`, on its device. The bias is the same Parameter, not a copy.

        ranges: for "int8-static" the range of x under the name "", as `calibrate(linear, batches)` returns it.

        Raises ValueError if the weight holds NaN or an infinity, is on the meta device or is too wide for the scheme,
        TypeError for other modules or dtypes than fp32, bf16 and fp16.
        """
        scheme = get_scheme(scheme)
        ranges = ranges_for(scheme, ranges)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        _check_weight(weight)
        subclass = cls._classes[type(scheme)]
        # Made in inference mode, the buffers could not be loaded into later.
        with torch.inference_mode(False), torch.no_grad():
            self = subclass(
                linear.in_features, linear.out_features, linear.bias is not None, scheme, "meta", weight.dtype
            )
            self.bias = linear.bias
            self._quantize(weight)
            if ranges is not None:
                self._calibrate(ranges)
        return self.train(linear.training)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """input: as nn.Linear calls it; x: as the Conv1D of transformers does."""
        x = input if x is None else x
        if not isinstance(x, Tensor):
            raise TypeError(f"input must be a tensor [..., in_features={self.in_features}], got {type(x).__name__}")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must be [..., in_features={self.in_features}], got shape {tuple(x.shape)}")
        bias = self._parameters["bias"]
        # In a trace of torch.jit, a Python function could not be saved.
        differentiated = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if differentiated and torch._C._get_tracing_state() is None:
            return _StraightThrough.apply(x, bias, self)
        return self._linear(x, bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, [out_features, in_features] in `dtype`: a new tensor each time."""
        before = _codes_before.get(self)
        names = self._of_weight if before is None or before() is None else (self._packed["weight"],)
        return read_from(self._dequantize(), self._form(), {name: self._buffers[name] for name in names})

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the name where peft looks for a layer's device before it dequantizes `weight`."""
        codes = self._buffers[self._of_weight[0]]
        assert codes is not None
        return codes

    def _form(self) -> tuple[Any, ...]:
        """What layers must have in common to share codes."""
        return (*type(self)._of_weight, self.scheme, self.out_features, self.in_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._assign_weight(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self._assign_weight(param)
        else:
            super().register_parameter(name, param)

    def _assign_weight(self, value: Any) -> None:
        before = _codes_before.pop(self, None)
        if isinstance(value, DequantizedWeight) and value.form == self._form():
            codes = self._packed.get("weight")
            if codes is not None and before is not None and before() is value.buffers[codes]:
                self._buffers[codes] = value.buffers[codes]
            else:
                if codes is not None and len(value.buffers) < len(self._of_weight):
                    self._remember_codes(codes)
                self._buffers.update(value.buffers)
            return
        check_type("weight", value, Tensor, "a tensor")
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise RuntimeError(
                "weight of a quantized layer must be values, got a tensor that torch.func transforms: no gradient goes "
                "through quantizing, and each weight is quantized by itself; transform the float layer"
            )
        here = self._buffers[self._of_weight[0]]
        device = value.device if here is None or here.is_meta else here.device
        shape, dtypes = self._expected()["weight"] if "weight" in self._packed else (None, ())
        if value.dtype in dtypes and tuple(value.shape) == shape:
            codes = self._packed["weight"]
            self._remember_codes(codes)
            self._buffers[codes] = self._pack("weight", value.detach().to(device))
            return
        if tuple(value.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight must be [out_features={self.out_features}, in_features={self.in_features}], "
                f"got {list(value.shape)}"
            )
        _check_weight(value)
        if isinstance(value, nn.Parameter) or value.grad_fn is not None:
            warnings.warn(
                "weight was quantized from the Parameter's values; the two are not tied: what is later done to the "
                "Parameter does not reach this layer, and no gradient reaches the Parameter",
                stacklevel=3,
            )
        with torch.inference_mode(False), torch.no_grad():
            self._quantize(value.detach().to(device))

    def _remember_codes(self, name: str) -> None:
        if (old := self._buffers[name]) is not None:
            _codes_before[self] = weakref.ref(old)

    _of_weight: ClassVar[tuple[str, ...]]  # the buffers that make up the weight

    # What computes with the weight takes it from `buffers`, by default the layer's own: in training they are made anew
    # in each call, and the layer itself stays as it is.

    def _dequantize(self, buffers: Buffers | None = None) -> Tensor:
        """The weight, [out_features, in_features] in `dtype`, a plain tensor."""
        raise NotImplementedError

    def _quantized(self, weight: Tensor) -> dict[str, Tensor | None]:
        """The buffers that a float weight [out_features, in_features] becomes, those of `_of_weight`."""
        raise NotImplementedError

    def _quantize(self, weight: Tensor) -> None:
        """Takes over a float weight [out_features, in_features]."""
        self._buffers.update(self._quantized(weight))

    def _calibrate(self, ranges: Mapping[str, Range]) -> None:
        """Takes over the range of the activations; only for schemes that need it."""
        raise NotImplementedError

    def _linear(self, x: Tensor, bias: Tensor | None, buffers: Buffers | None = None) -> Tensor:
        """The layer without a gradient. bias: the layer's, or what a transform of torch.func has in its place."""
        raise NotImplementedError

    def _seen(self, x: Tensor, buffers: Buffers | None = None) -> Tensor:
        """x as the product sees it: quantized and dequantized where the layer quantizes it."""
        return x

    def _scales(self) -> Tensor:
        """The scales of the weight, as operators take them beside the packed codes."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """weight[ids] in `dtype`, [*ids.shape, in_features], of which only these rows are dequantized: an embedding."""
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """begin, end and weight[begin:end] in fp32, at most PIECE elements of it at a time, in the order of rows."""
        height = max(1, PIECE // max(1, self.in_features))
        device = next(self.buffers()).device
        for begin in range(0, self.out_features, height):
            end = min(begin + height, self.out_features)
            yield begin, end, self.rows(torch.arange(begin, end, device=device)).float()

    def _times_weight(self, grad: Tensor) -> Tensor:
        """grad @ weight, [..., out_features] -> [..., in_features] of grad's dtype. Ours hold no dequantized copy."""
        return grad @ self._dequantize().to(grad.dtype)

    # A subclass stores some keys of its state_dict in a form that each type of device has for itself:

    _packed: ClassVar[dict[str, str]] = {}  # key -> buffer, which is not saved

    def _plain(self, key: str) -> Tensor:
        """What the state_dict has under `key`, out of the buffer."""
        raise NotImplementedError

    def _pack(self, key: str, value: Tensor) -> Tensor:
        """The buffer's form of `value`, for the device on which it is."""
        raise NotImplementedError

    def _packed_shapes(self, key: str, kernels: Kernels) -> tuple[Shape, ...]:
        """The shapes that the buffer may have in a form of a backend."""
        raise NotImplementedError

    def _unpacked(self, key: str, kernels: Kernels, value: Tensor) -> Tensor:
        """What the state_dict has under `key`, out of a buffer in the form of that backend, on the CPU."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs anew what was packed for another device: map_location of torch.load moves a buffer as it is."""
        super().__setstate__(state)
        for key, name in self._packed.items():
            buffer = self._buffers[name]
            assert buffer is not None
            if buffer.shape in self._packed_shapes(key, kernels_of(buffer.device)):
                continue
            backends = (*BACKENDS.values(), reference)
            there = [kernels for kernels in backends if buffer.shape in self._packed_shapes(key, kernels)]
            if not there:
                raise ValueError(
                    f"{name} must be in the form of a device of this version of pyqkern, got {list(buffer.shape)}; "
                    "save the state_dict instead of the module, which is the same on every device"
                )
            plain = self._unpacked(key, there[0], buffer.cpu())
            self._buffers[name] = self._pack(key, plain.to(buffer.device))

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shape and possible dtypes of the state_dict's keys."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLinear":
        """.to(), .half(), .cuda(): buffers move, but keep their dtype; the scales are fp32 whatever the model is."""
        tensors = (*self._buffers.values(), *self._parameters.values())
        device = next(tensor.device for tensor in tensors if tensor is not None)
        moved = fn(torch.empty(0, dtype=self.dtype, device=device))
        self.dtype, moves = moved.dtype, kernels_of(moved.device) is not kernels_of(device)
        for key, name in self._packed.items() if moves else ():
            self._buffers[name] = self._plain(key)
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        for key, name in self._packed.items() if moves else ():
            value = self._buffers[name]
            assert value is not None
            self._buffers[name] = self._pack(key, value)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key in self._packed:
            destination[prefix + key] = self._plain(key)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads all of the layer, or, where a key has the wrong shape or dtype, nothing of it."""
        problems = self._load_problems(state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, buffer in self._packed.items():
            key = prefix + name
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            old = self._buffers[buffer]
            assert old is not None
            if assign:
                self._buffers[buffer] = self._pack(name, state_dict[key])
            elif not old.is_meta:
                packed = self._pack(name, state_dict[key].to(old.device))
                if packed.shape == old.shape:
                    old.copy_(packed)
                else:  # the old one was packed for another CPU
                    self._buffers[buffer] = packed

    def _load_problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        problems = []
        for name, (shape, dtypes) in self._expected().items():
            value = state_dict.get(prefix + name)
            if value is None or (name == "bias" and self.bias is None):
                continue
            if tuple(value.shape) != shape or value.dtype not in dtypes:
                wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                problems.append(
                    f"{prefix}{name} must be {wanted} {list(shape)}, got {str(value.dtype).removeprefix('torch.')} "
                    f"{list(value.shape)}; a float checkpoint is loaded before replace_linear, a quantized one after"
                )
        return problems

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}"
        )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}; convert it with .float()")
    if weight.is_meta:
        raise ValueError("weight must hold values, got a tensor on the meta device; load the weights first")
    if weight.numel() and not all(end.isfinite() for end in weight.detach().aminmax()):
        raise ValueError("weight must be finite, got NaN or an infinity in it; repair it first")


class _StraightThrough(torch.autograd.Function):
    """The layer in grad mode: the quantizations count as the identity, so that grad_x = grad_y @ weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: QLinear) -> Tensor:
        return layer._linear(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, QLinear], output: Tensor) -> None:
        x, bias, ctx.layer = inputs
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.layer._times_weight(grad).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


def to_trained(linears: Sequence[QLinear], grads: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients to the float weights that are trained: grads [rows, out_features] of what came of rows."""
    return [
        None if linear.trained is None else (grad.t() @ linear._seen(seen)).to(linear.trained.dtype)
        for linear, grad, seen in zip(linears, grads, rows, strict=True)
    ]


def as_linear(weight: nn.Parameter) -> nn.Linear:
    """A weight [out_features, in_features] as an nn.Linear without bias, the same Parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear
