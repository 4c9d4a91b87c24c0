"""What every backend provides, and the numbers that all of them share.

A backend is a module with the functions of `pyqkern.backends.reference`: plain torch there, C++ in `cpu`, Triton in
`cuda`. `pyqkern.ops.registry` chooses between them.

`sizes = (outer, channels, inner)` is how a contiguous tensor of any shape is seen: channel c has scale[c] and
zero_point[c]. Per tensor is (1, 1, numel), per channel on axis 0 of [N, K] is (1, N, K), on axis 1 (N, K, 1).
"""

import torch

Sizes = tuple[int, int, int]

# The range of each quantized type, [qmin, qmax].
QRANGE = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def qrange(dtype: torch.dtype, bits: int = 8) -> tuple[int, int]:
    """[qmin, qmax] of codes of 8 or 4 bits, which are kept one to an element of dtype."""
    qmin, qmax = QRANGE[dtype]
    return (qmin, qmax) if bits == 8 else (qmin // 16, qmax // 16)


# The activations that the linear's tail can apply; the position is the code that C++ takes.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")

# The largest in_features for which 255 * 127 * K < 2**31: beyond it an int32 sum could wrap.
INT8_LINEAR_MAX_K = 66311

# The largest K for which 128 * 128 * K (int8) or 255 * 128 * K (uint8) is below 2**31.
INT8_MATMUL_MAX_K = {torch.int8: 131071, torch.uint8: 65793}
FLT_MIN = 2.0**-126
PANEL = 16
