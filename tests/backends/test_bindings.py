"""pyqkern._C called directly: what does not fit raises, and no call reads or writes past a tensor."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from strategies import floats, integers
from torch import Tensor

from pyqkern import _C
from pyqkern.backends import cpu

N, K, M, BLOCK = 40, 96, 3, 32
X, W = floats((M, K), 1), integers((N, K), 2, torch.int8)
SCALE, BIAS, GRAD = torch.rand(N) + 0.1, torch.randn(N), floats((M, N), 8)
PANELS = cpu.int8_pack(W)
WIDE = integers((N, 256), 4, torch.int8) // 4
SPLIT = cpu.int8_pack(WIDE, True)
FLAT, ABSMAX = cpu.quantize_4bit(floats((N, K), 3), "nf4", BLOCK)
LINES, SCALES = cpu.pack_4bit(FLAT, N, K, BLOCK), cpu.pack_scales(ABSMAX, N, K, BLOCK)
ROWS, NF4 = torch.tensor([0, 39, 5]), cpu._BOOKS["nf4"]
NESTED = (torch.ones(1), torch.linspace(-1, 1, 256), torch.tensor(0.5))
CODES = SCALES.to(torch.uint8)


def ints(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def linears(sizes: list[tuple[int, int]], four_bits: bool) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Weights, scales, biases and what doubly quantized scales stand for, of linears of [out, in] features."""
    biases = [torch.zeros(n) for n, _ in sizes]
    if not four_bits:
        weights = [cpu.int8_pack(integers(size, 4, torch.int8)) for size in sizes]
        return weights, [torch.rand(n) * 0.01 for n, _ in sizes], biases, []
    weights = [ints(-(-n // 16), 8 * k) for n, k in sizes]
    scales = [ints(-(-n // 16), 16 * k // BLOCK) for n, k in sizes]
    return weights, scales, biases, [t for _ in sizes for t in (torch.ones(1), NESTED[1], NESTED[2])]


def encoder(four_bits: bool) -> list[Any]:
    hidden, wide = 64, 96
    sizes = [(hidden, hidden)] * 4 + [(wide, hidden), (hidden, wide)]
    weights, scales, biases, nested = linears(sizes, four_bits)
    mask, bias = torch.ones(3, 1, 1, 5, dtype=torch.bool), torch.zeros(1, 4, 5, 5)
    norms, factors = [torch.ones(hidden)] * 4, [torch.ones(hidden)] * 2
    sizes_and_numbers = (hidden, wide, 4, 1e-5, 1e-5, 0.25, 2, four_bits, 8, *((NF4, BLOCK) if four_bits else (-1, 0)))
    lists = (weights, scales, biases, nested, norms, factors)
    return [floats((3, 5, hidden), 5), mask, bias, *lists, *sizes_and_numbers, torch.empty(3, 5, hidden)]


def decoder(four_bits: bool) -> list[Any]:
    """A mask is given, so that no window is right, and other numbers but those of the tensors are wrong."""
    hidden, wide, past, length, kv_heads = 64, 96, 2, 5, 2
    sizes = [(64, hidden), (32, hidden), (32, hidden), (hidden, 64), (wide, hidden), (wide, hidden), (hidden, wide)]
    weights, scales, biases, nested = linears(sizes, four_bits)
    caches = list(torch.zeros(2, 3, kv_heads, 8, 16))
    mask, bias = torch.ones(3, 1, 1, past + length, dtype=torch.bool), torch.zeros(1, 4, 5, past + length)
    rotary = [torch.ones(1, length, 8)] * 2
    lists = (weights, scales, biases, [torch.ones(hidden)] * 4, nested, [torch.ones(16)] * 2)
    form = (4, kv_heads, 16, wide, 0.25, 1e-5, 5, True, True, 8, False, *((NF4, BLOCK) if four_bits else (-1, 0)))
    x = floats((3, length, hidden), 5)
    return [x, *caches, past, mask, bias, *rotary, *lists, *form, 0.0, False, 0, torch.empty(3, length, hidden)]


def run(name: str, given: Sequence[Any]) -> Any:
    """Calls a function of _C. Those of layers take tuples, and decoder_layer a DecoderForm of some of the arguments."""
    if name in ("encoder_layer", "decoder_layer", "recurrent"):
        given = [tuple(one) if isinstance(one, list) else one for one in given]
    if name == "decoder_layer" and len(given) > 15:
        given = [*given[:14], _C.DecoderForm(*given[14:-1]), given[-1]]
    return getattr(_C, name)(*given)


def recurrent(four_bits: bool, projects: bool) -> list[Any]:
    hidden, state, gates = 32, 64 if projects else 32, 4
    sizes = [(gates * hidden, K), (gates * hidden, state), (state, hidden)][: 3 if projects else 2]
    weights = [cpu.int8_pack(integers(size, 6, torch.int8)) for size in sizes]
    scales, nested = [torch.rand(n) * 0.01 for n, _ in sizes], []
    if four_bits:
        weights = [ints(-(-n // 16), 8 * k) for n, k in sizes]
        scales = [ints(-(-n // 16), 16 * k // BLOCK) for n, k in sizes]
        nested = [t for n, k in sizes for t in (torch.ones(-(-n * k // (256 * BLOCK))), *NESTED[1:])]
    biases = [torch.zeros(gates * hidden)] * 2
    numbers = (3, False, four_bits, 8, True, *((NF4, BLOCK) if four_bits else (-1, 0)))
    states = torch.zeros(2, state), torch.zeros(2, hidden), torch.empty(3, state)
    return [X, torch.tensor([2, 1]), weights, scales, biases, nested, *numbers, *states]


def step_lists(codes: bool, second: bool) -> list[list[Tensor]]:
    n = 300
    states = [[ints(n) if codes else torch.zeros(n)] if i == 0 or second else [] for i in range(2)]
    absmax = [[torch.ones(2)] if codes and (i == 0 or second) else [] for i in range(2)]
    return [[torch.ones(n)], [torch.ones(n).half()], *states, *absmax]


# Good calls.
CALLS: dict[str, list[list[Any]]] = {
    "min_max": [[X, 1, M, K, torch.empty(M), torch.empty(M)]],
    "quantize": [[X, torch.ones(M), ints(M, dtype=torch.int32), 1, M, K, False, ints(M, K), 8]],
    "dequantize": [[W, SCALE, ints(N, dtype=torch.int32), 1, N, K, torch.empty(N, K)]],
    "fake_quantize": [
        [X, K, torch.ones(M), ints(M, dtype=torch.int32), 0, 255, torch.empty(M, K)],
        [X, K, torch.ones(1), None, -127, 127, torch.empty(M, K)],
    ],
    "fake_quantize_backward": [
        [X, X, K, torch.ones(M), ints(M, dtype=torch.int32), 0, 127, torch.empty(M, K), torch.empty(M), torch.empty(M)],
    ],
    "elementwise": [[1, X, torch.empty(M, K)]],
    "gate": [[5, X, torch.empty(M, K // 2)]],
    "pack_int8": [[W, torch.empty_like(PANELS)], [WIDE, torch.empty_like(SPLIT)]],
    "unpack_int8": [[PANELS, torch.empty_like(W)], [SPLIT, torch.empty_like(WIDE)]],
    "int8_gather": [[PANELS, N, ROWS, ints(3, K, dtype=torch.int8)]],
    "int8_matmul": [
        [W[:M], W, ints(M, N, dtype=torch.int32)],
        [W[:M].to(torch.uint8), W, ints(M, N, dtype=torch.int32)],
    ],
    "int8_linear": [
        [X, PANELS, SCALE, BIAS, torch.empty(M, N), 2, False, 8],
        [X, PANELS, SCALE, BIAS, torch.empty(M, N), 2, False, 7, torch.ones(1), ints(1, dtype=torch.int32)],
        [floats((33, 256), 7), SPLIT, SCALE, BIAS, torch.empty(33, N), 2, False, 8],
    ],
    "int8_linear_weight_only": [
        [X, PANELS, SCALE, BIAS, torch.empty(M, N)],
        [floats((33, 256), 7), SPLIT, SCALE, BIAS, torch.empty(33, N)],
    ],
    "int8_grad_input": [[GRAD, PANELS, SCALE, torch.empty(M, K)], [GRAD, SPLIT, SCALE, torch.empty(M, 256)]],
    "grad_input_4bit": [
        [GRAD, LINES, SCALES, None, None, None, torch.empty(M, K), NF4, BLOCK],
        [GRAD, LINES, CODES, *NESTED, torch.empty(M, K), NF4, BLOCK],
    ],
    "quantize_4bit": [[X, BLOCK, NF4, ints(M * K // 2), torch.empty(M * K // BLOCK)]],
    "dequantize_4bit": [
        [FLAT, ABSMAX, None, None, None, BLOCK, NF4, torch.empty(N, K)],
        [FLAT, ABSMAX.to(torch.uint8), *NESTED, BLOCK, NF4, torch.empty(N, K)],
    ],
    "pack_4bit": [[FLAT, N, K, torch.empty_like(LINES)]],
    "unpack_4bit": [[LINES, N, K, torch.empty_like(FLAT)]],
    "linear_4bit": [
        [X, LINES, SCALES, None, None, None, BIAS, torch.empty(M, N), NF4, BLOCK, True],
        [X, LINES, CODES, *NESTED, BIAS, torch.empty(M, N), NF4, BLOCK, False],
    ],
    "gather_4bit": [[LINES, SCALES, N, K, BLOCK, ROWS, ints(3, K // 2), torch.empty(3, K // BLOCK)]],
    "dequantize_rows_4bit": [[FLAT, ABSMAX, N, BLOCK, NF4, ROWS, torch.empty(3, K)]],
    "encoder_layer": [encoder(False), encoder(True)],
    "decoder_layer": [decoder(False), decoder(True)],
    "recurrent": [recurrent(False, True), recurrent(True, False)],
    "optimizer_step": [
        [0, [1.0] * 10, cpu._MAPS, *step_lists(True, True)],
        [2, [1.0] * 10, cpu._MAPS, *step_lists(True, False)],
        [0, [1.0] * 10, cpu._MAPS, *step_lists(False, True)],
    ],
    "square_sum": [],  # takes any number of tensors: below
    "add_codebook": [],  # for one, below
}
OPTIONAL = {
    ("fake_quantize", 3),
    ("fake_quantize_backward", 4),
    ("quantize", 2),
    ("dequantize", 2),
    ("int8_linear", 3),
    ("int8_linear_weight_only", 3),
    ("decoder_layer", 4),
    ("decoder_layer", 5),
    ("decoder_layer", 10),
}
OPTIONAL |= {("recurrent", 4), ("linear_4bit", 6), ("encoder_layer", 1), ("encoder_layer", 2), ("encoder_layer", 5)}


TRUSTING = (
    "int8_linear",
    "int8_linear_weight_only",
    "linear_4bit",
    "int8_grad_input",
    "grad_input_4bit",
    "encoder_layer",
    "decoder_layer",
    "recurrent",
)  # see kTrusted of csrc/python/tensors.h


class Subclass(Tensor):
    pass


def emptied(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    """Larger than its storage."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


BAD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda t: None,
    "a number": lambda t: t.data_ptr(),
    "double": lambda t: t.double(),
    "int16": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "a subclass": lambda t: t.clone().as_subclass(Subclass),
    "twice as many": lambda t: torch.cat([t.reshape(-1)] * 2),
    "twice as many rows": lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
    "half as many": lambda t: t.reshape(-1)[: t.numel() // 2],
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "nothing in it": lambda t: t.reshape(-1)[:0],
    "an emptied storage": emptied,
    "a shrunk storage": shrunk,
    "negative": lambda t: torch._neg_view(t) if t.is_floating_point() else None,
    "sparse": lambda t: t.to_sparse(),
}
BAD_NUMBERS = [-3, 2**31, 2**40, 2**62, 2**70, -(2**70), 0.5, None, "x", X]


def broken(name: str, call: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The call with one argument, or one item of an argument, changed."""
    for i, value in enumerate(call):
        items = range(len(value)) if isinstance(value, list) else [None]
        for item in items:
            given = value if item is None else value[item]
            for what, bad in changes(given):
                if what == "a shrunk storage" and name in TRUSTING:
                    continue
                if bad is None and (name, i) in OPTIONAL:
                    continue
                changed = bad if item is None else [*value[:item], bad, *value[item + 1 :]]
                yield f"argument {i} {'' if item is None else item}: {what}", [*call[:i], changed, *call[i + 1 :]]
        if isinstance(value, list):
            yield f"argument {i}: one less", [*call[:i], value[:-1] or [X], *call[i + 1 :]]


def changes(given: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(given, Tensor):
        for what, change in BAD_TENSORS.items():
            if not (what == "not contiguous" and given.numel() == 1):  # any stride is right
                yield what, change(given)
    elif isinstance(given, bool):
        yield "two values", torch.ones(2)
    elif isinstance(given, int):
        yield from ((repr(bad), bad) for bad in BAD_NUMBERS)
    elif given is None:
        yield "one of three", torch.ones(1)


def test_every_function_is_called_here() -> None:
    about_tensors = {name for name, value in vars(_C).items() if callable(value) and inspect.isbuiltin(value)}
    assert about_tensors - set(CALLS) == {
        "isa",
        "isas",
        "set_isa",
        "splits",
        "threads",
        "openmp",
        "use_torch",
        "unchanged",
    }


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_raises(name: str) -> None:
    for call in CALLS[name]:
        run(name, call)
        for what, arguments in broken(name, call):
            try:
                run(name, arguments)
            except (TypeError, ValueError) as error:
                assert str(error), what
            else:
                pytest.fail(f"{name} took {what}")
        for count in (0, len(call) - 1, len(call) + 1):
            with pytest.raises(TypeError):
                run(name, [*call, None][:count])


def test_unchanged() -> None:
    """Objects are told apart by identity; a NaN is itself, and an equal list is another."""
    here, thing, nan = {"a": 1, "b": None, 7: X}, [1], float("nan")
    here |= {"thing": thing, "nan": nan}
    places = (here, "a", 1, here, "b", None, here, 7, X, here, "c", ..., here, "thing", thing, here, "nan", nan)
    kinds, sizes = (X, Tensor, thing, list), (here, 5, {}, 0)
    assert _C.unchanged(places, kinds, sizes) and _C.unchanged((), (), ())
    for place in ((here, "thing", [1]), (here, "b", ...), (here, "c", None), ({}, "a", 1)):
        assert not _C.unchanged((*places, *place), kinds, sizes)
    assert not _C.unchanged(places, (X, object), sizes) and not _C.unchanged(places, kinds, (here, 4))
    wrong: list[tuple[Any, ...]] = [
        (places[:-1], (), ()), ((), kinds[:-1], ()), ((), (), sizes[:-1]), (([], 0, 0), (), ()),
        ((here, [], 0), (), ()), ((), (), ([], 0)), ((), (), (here, "x")), ((), (), (here, 2**70)),
        (list(places), (), ()), ((), ()),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            _C.unchanged(*arguments)


def test_a_codebook_is_208_bytes_and_there_are_not_many() -> None:
    for record in (ints(207), ints(208, dtype=torch.int8), None, ints(416)[::2]):
        with pytest.raises((TypeError, ValueError)):
            _C.add_codebook(record)


def test_without_the_exchange_functions(isa: str) -> None:
    """torch before 2.10: tensors are read by capsules, with the same results and the same checks."""
    use = (Tensor, torch.nn.Parameter, torch._C._to_dlpack, torch.get_num_threads)
    call = CALLS["int8_linear"][0]
    _C.int8_linear(*call)
    expected = call[4].clone()
    try:
        assert not _C.use_torch(*use, None)
        call[4].zero_()
        _C.int8_linear(*call)
        assert torch.equal(call[4], expected)
        for _, arguments in broken("int8_linear", call):
            with pytest.raises((TypeError, ValueError)):
                _C.int8_linear(*arguments)
    finally:
        assert _C.use_torch(*use, Tensor.__dlpack_c_exchange_api__) == cpu.READS_FAST


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [3, 0], [2, 1, 0], [1, 1, 1], [4, -1], [-1, 4]])
def test_batch_sizes_that_do_not_descend_or_add_up(sizes: list[int]) -> None:
    call = recurrent(False, True)
    call[1] = torch.tensor(sizes)
    with pytest.raises(ValueError, match="batch_sizes must"):
        run("recurrent", call)


def test_what_a_sum_of_squares_does_not_take() -> None:
    assert _C.square_sum([X, X.half()], 0.5) > 0 and _C.square_sum([], 0.5) == 0
    for what, bad in changes(X):
        if not what.startswith(("twice", "half")):
            with pytest.raises((TypeError, ValueError)):
                _C.square_sum([X, bad], 0.5)
