"""Fake quantization and its backward pass in plain torch. See `pyqkern.backends.reference`."""

import torch
from torch import Tensor
from torch.nn import functional

SUMS = 16  # sums to a row, which are added in halves


def _codes(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x * (1/scale) + zero_point, two roundings, fp32 [rows, size], NaN taken for the zero point; scale, zero point."""
    scale = scale.view(-1, 1)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.view(-1, 1).float()
    value = x.reshape(-1, size).float() * (1.0 / scale) + zero
    return torch.where(value.isnan(), zero, value), scale, zero


def fake_quantize(x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """scale * (clamp(rint(x * (1/scale) + zero_point), qmin, qmax) - zero_point), of x's dtype; NaN stays NaN."""
    value, scale, zero = _codes(x, size, scale, zero_point)
    y = scale * (value.round().clamp(qmin, qmax) - zero)
    return torch.where(x.reshape(-1, size).isnan(), torch.nan, y).to(x.dtype).view(x.shape)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, size: int, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to x, of its dtype, and for each row those to the scale and to the offset, fp32 [rows].

    y = scale * q + offset with q = clamp(rint(v), qmin, qmax), v = x * (1/scale) + zero_point, offset = scale *
    -zero_point; rounding counts as the identity:

                             d/dx   d/dscale   d/doffset
        rint(v) in the range   1    rint(v) - v    0
        elsewhere              0        q          1

    from Esser et al., "Learned step size quantization", 2020, and Bhalgat et al., "LSQ+", 2020. A row's terms are added
    to sixteen sums, i % 16, one after another, and these in halves.
    """
    value, _, _ = _codes(x, size, scale, zero_point)
    grad = grad.reshape(-1, size).float()
    code = value.round()
    inside = (code >= qmin) & (code <= qmax)
    of_scale = grad * torch.where(inside, code - value, code.clamp(qmin, qmax))
    of_offset = torch.where(inside, 0.0, grad)
    by_x = torch.where(inside, grad, 0.0).to(x.dtype).view(x.shape)
    return by_x, _row_sums(of_scale), _row_sums(of_offset)


def _row_sums(terms: Tensor) -> Tensor:
    terms = functional.pad(terms, (0, -terms.shape[1] % SUMS)).view(terms.shape[0], -1, SUMS)
    sums = torch.zeros_like(terms[:, 0])
    for each in terms.unbind(1):
        sums = sums + each
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
