"""Where the Triton kernels' numbers are tested: on the GPU, or under TRITON_INTERPRET=1 in numpy on the CPU.

Triton decides that when a kernel is imported, for the whole process; `test_under_the_interpreter` starts the second.
"""

from __future__ import annotations

import atexit
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from hypothesis import settings
from hypothesis import strategies as st
from require import available, require
from simulated_cuda import held
from strategies import FLOATS
from torch import Tensor

from pyqkern.backends import QRANGE, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = "cpu" if INTERPRETED else "cuda"
EPS = 2.0**-24  # half an ulp of fp32, relative

if available("triton"):
    from pyqkern.kernels import affine, fake_quantize, four_bit, int8, optimizer, row_quantize

    KERNELS = {
        name: kernel
        for module in (affine, fake_quantize, four_bit, int8, optimizer, row_quantize)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }

if INTERPRETED:
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    RAN: set[str] = set()

    class RightArithmetic(interpreter.InterpreterBuilder):
        """Triton's interpreter rounds fp32 to bf16 half up and drops a carry, takes bf16 denormals for zero, multiplies
        bf16 matrices as if their bits were integers, and before 3.9 rounds an fma twice."""

        def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
            types = src.dtype.scalar, dst_type.scalar
            if types == (interpreter.tl.float32, interpreter.tl.bfloat16):
                rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
                return interpreter.TensorHandle(rounded.view("uint16"), interpreter.tl.bfloat16)
            if types == (interpreter.tl.bfloat16, interpreter.tl.float32):
                widened = (src.data.astype("uint32") << 16).view("float32")
                return interpreter.TensorHandle(widened, interpreter.tl.float32)
            return super().cast_impl(src, dst_type)

        create_fp_trunc = create_fp_ext = cast_impl

        def create_dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
            bf16 = interpreter.tl.bfloat16
            operands = [self.cast_impl(t, interpreter.tl.float32) if t.dtype.scalar == bf16 else t for t in (a, b)]
            return super().create_dot(*operands, d, *options)

        def create_fma(self, x, y, z):  # type: ignore[no-untyped-def]
            operands = torch.broadcast_tensors(*(torch.from_numpy(numpy.array(t.data)) for t in (x, y, z)))
            return interpreter.TensorHandle(reference.fma(*operands).numpy(), z.dtype.scalar)

    interpreter.interpreter_builder.__class__ = RightArithmetic
    run = interpreter.InterpretedFunction.run

    def on_the_host(argument):  # type: ignore[no-untyped-def]
        if isinstance(argument, TensorDescriptor):
            return replace(argument, base=held(argument.base))
        return held(argument)

    def recorded(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        RAN.add(self.fn.__name__)
        return run(self, *map(on_the_host, args), **kwargs)

    interpreter.InterpretedFunction.run = recorded

    if "PYQKERN_RAN" in os.environ:  # where to say which kernels have run
        atexit.register(lambda: Path(os.environ["PYQKERN_RAN"]).write_text(json.dumps(sorted(RAN & set(KERNELS)))))


def require_device() -> None:
    require("triton", "the kernels' numbers are not checked")
    if not INTERPRETED:
        require("cuda", "test_under_the_interpreter ran this test on the CPU")


few = settings(max_examples=50)
rows = st.sampled_from([1, 2, 3, 5, 16, 17, 33])
widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 200, 257]))
float_types = st.sampled_from(FLOATS)
qtypes = st.sampled_from(list(QRANGE))


def same(a: Tensor, b: Tensor) -> None:
    """Bit for bit, but that any NaN equals any other."""
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
