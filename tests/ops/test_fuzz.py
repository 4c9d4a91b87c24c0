"""All operators on arguments that contradict one another, and on tensors of every kind: an error, never a crash."""

from typing import Any

import pytest
import torch
from calls import CALLS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import integers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from pyqkern import QEmbedding

TABLE = QEmbedding.from_embedding(torch.nn.Embedding(40, 96), "int8").table
ALL = CALLS | {
    "int8_embedding": [(torch.tensor([3, 39]), TABLE.packed, TABLE.weight_scale, 96, torch.float32)],
    "embedding_4bit": [(torch.tensor([5, 39]), *CALLS["linear_4bit"][0][1:6], "nf4", 64, 40, 128, torch.float32)],
}

INT8 = [torch.ops.pyqkern.int8_pack(integers((12, k), 1, torch.int8)) for k in (5, 3)]
LSTM = (INT8, [torch.rand(12)] * 2, [torch.rand(12)] * 2, torch.rand(2, 3), torch.rand(2, 3), "lstm", False)
CODES = [torch.ops.pyqkern.pack_4bit(torch.zeros(64 * 32, dtype=torch.uint8), 64, 64, 64) for _ in range(2)]
RNN = (CODES, [torch.rand(4, 16)] * 2, [], torch.rand(2, 64), None, "rnn_relu", True, False, 8, "nf4", 64, [], "auto")
OF_Y = (
    torch.rand(3, 2, 3),
    torch.rand(2, 3),
    torch.rand(2, 3),
    torch.rand(3, 2, 3),
    [torch.rand(12, k) for k in (5, 3)],
)
ALL["recurrent"] = [
    (torch.rand(3, 2, 5), None, *LSTM),
    (torch.rand(3, 5), torch.tensor([2, 1]), *LSTM, False, 7),
    (torch.rand(3, 2, 64), None, *RNN),
]
ALL["recurrent_backward"] = [(*OF_Y, torch.rand(3, 2, 5), None, *LSTM)]
STACKS = [(torch.ops.pyqkern.int8_pack(integers((2 * n, 16), 1, torch.int8)), torch.rand(2 * n)) for n in (32, 16)]
TOKENS = (torch.rand(3, 16), torch.tensor([[0, 1], [1, 2], [0, 0]]), torch.rand(3, 2))
ALL["experts"] = [(*TOKENS, *map(list, STACKS), 2, 16, "silu"), (*TOKENS, *map(list, STACKS), 2, 16, "gelu", False, 7)]
CODES_OF = [torch.zeros(300, dtype=torch.uint8)]
ALL["optimizer_step"] = [
    ("adam", [1.0] * 10, [torch.ones(300)], [torch.ones(300)], CODES_OF, CODES_OF, [torch.ones(2)], [torch.ones(2)]),
    ("lion", [1.0] * 10, [torch.ones(300)], [torch.ones(300)], [torch.ones(300)], [], [], []),
]
ALL["square_sum"] = [([torch.ones(300), torch.ones(3).half()], 1.0)]
ALL["experts_backward"] = [(torch.rand(3, 16), *ALL["experts"][0])]


class Wrapper(Tensor):
    """A tensor without memory of its own."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapper":
        self = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map(lambda a: a.held if isinstance(a, Wrapper) else a, args), **(kwargs or {}))


KINDS = {
    "as it is": lambda t: t,
    "wrapper": Wrapper,
    "negative": lambda t: torch._neg_view(t) if t.dtype.is_floating_point else t,
    "conjugated": lambda t: torch.complex(t.float(), t.float()).conj().imag if t.dtype.is_floating_point else t,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "meta": lambda t: t.to("meta"),
    "empty": lambda t: t[:0] if t.dim() else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and len(t) else t,
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "flat": lambda t: t.reshape(-1),
    "one more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "one less": lambda t: t[:-1] if t.dim() else t,
    "0-dim": lambda t: t.reshape(-1)[0] if t.numel() else t,
    "sparse": lambda t: t.to_sparse(),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "functional": torch._to_functional_tensor,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**40, 2**62, -(2**40), 66312]))
OTHERS = {
    bool: st.booleans(),
    int: NUMBERS,
    float: st.floats(),
    str: st.sampled_from(["none", "gelu", "nf4", "int4", "auto", "bf16", "fp32", "gru", "rnn_tanh", "", "x"]),
    torch.dtype: st.sampled_from([torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]),
    list: st.lists(NUMBERS, max_size=3),
}
REFUSED = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError, AssertionError)


@st.composite
def broken_calls(draw: st.DrawFn) -> tuple[str, list[Any], list[tuple[int, str]]]:
    """An operator and a good call of it, of which some arguments are of another kind or have another value."""
    name = draw(st.sampled_from(sorted(ALL)))
    arguments, changes = list(draw(st.sampled_from(ALL[name]))), []
    for position in draw(st.sets(st.integers(0, len(arguments) - 1), min_size=1, max_size=3)):
        value = arguments[position]
        if isinstance(value, Tensor):
            kind = draw(st.sampled_from(sorted(KINDS)))
            arguments[position] = KINDS[kind](value)
            changes.append((position, kind))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            kind, at = draw(st.sampled_from(sorted(KINDS))), draw(st.integers(0, len(value) - 1))
            arguments[position] = [*value[:at], KINDS[kind](value[at]), *value[at + 1 :]]
            changes.append((position, kind))
        elif type(value) in OTHERS:
            arguments[position] = draw(OTHERS[type(value)])
            changes.append((position, repr(arguments[position])))
        else:  # an optional one that is not given
            arguments[position] = draw(st.one_of(st.none(), st.builds(torch.ones, st.integers(0, 300))))
    return name, arguments, changes


def check(call: tuple[str, list[Any], list[tuple[int, str]]]) -> None:
    name, arguments, _ = call
    try:
        result = getattr(torch.ops.pyqkern, name)(*arguments)
    except REFUSED as error:
        assert str(error), "an error says what is wrong"
        return
    for tensor in tree_leaves(result):
        assert tensor is None or isinstance(tensor, Tensor)
        if type(tensor) is Tensor and tensor.is_cpu and not torch._is_functional_tensor(tensor):
            tensor.clone()  # all of it can be read


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(broken_calls())
def test_no_argument_ends_the_process(call: tuple[str, list[Any], list[tuple[int, str]]]) -> None:
    check(call)


@pytest.mark.long
@settings(max_examples=20_000, suppress_health_check=list(HealthCheck))
@given(broken_calls())
def test_no_argument_ends_the_process_20_000_times(call: tuple[str, list[Any], list[tuple[int, str]]]) -> None:
    check(call)


@pytest.mark.parametrize("kind", ["wrapper", "negative", "conjugated", "every second", "a parameter"])
@pytest.mark.parametrize("name", ["int8_linear", "int8_linear_static", "linear_4bit"])
def test_the_short_way_reads_the_values_that_a_tensor_has(name: str, kind: str) -> None:
    """Of each argument in turn; a subclass without memory and a pending negation are no plain tensors."""
    from pyqkern.backends import Weight4bit
    from pyqkern.ops import four_bit, int8

    arguments = ALL[name][0]
    for position, value in enumerate(arguments):
        if not isinstance(value, Tensor):
            continue
        changed = [*arguments[:position], KINDS[kind](value), *arguments[position + 1 :]]
        expected = getattr(torch.ops.pyqkern, name)(*changed)
        if name == "linear_4bit":
            x, *tensors, bias, quant_type, blocksize, n, compute = changed
            weight = Weight4bit(*tensors, quant_type, blocksize, (n, x.shape[-1]))
            y = four_bit.linear_4bit(x, weight, bias, compute)
        else:
            y = getattr(int8, name)(*changed)
        assert torch.equal(y, expected)


def test_sizes_of_nothing_return() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    packed = torch.ops.pyqkern.pack_4bit(empty, 2**40, 0, 64)
    assert torch.ops.pyqkern.unpack_4bit(packed, 2**40, 0, 64).numel() == 0
    with pytest.raises(ValueError, match="packed must be"):
        torch.ops.pyqkern.unpack_4bit(empty, 2**40, 0, 64)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.pyqkern.int8_embedding(torch.tensor([1]), TABLE.packed, TABLE.weight_scale[:1], 96, torch.float32)
    with pytest.raises(TypeError, match="weight_scale must be float32"):
        torch.ops.pyqkern.int8_embedding(torch.tensor([1]), TABLE.packed, TABLE.weight_scale.half(), 96, torch.float32)
