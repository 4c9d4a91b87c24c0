"""QMultiheadAttention, an nn.MultiheadAttention whose four projections are linears of their own."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyqkern.nn.weight import read_from

INPUTS = ("q_proj", "k_proj", "v_proj")  # in the order in which in_proj_weight holds them
OUTPUTS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)  # what out_proj can be
PACKED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Projection(nn.Linear):
    """One of the projections of an nn.MultiheadAttention as a linear, which the attention itself does not have.

    The weight is a part of the attention's, in the same memory. place: the attention, and the name in it.
    """

    place: tuple[Any, str]


class QMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention with the linears q_proj, k_proj, v_proj and out_proj; replace_linear makes it of one.

    What it takes and returns is what nn.MultiheadAttention does; scores, softmax and their product with the values are
    in float. Nested tensors are refused. Torch's fast paths, which would multiply with the dequantized weights, are not
    taken, neither here nor in nn.TransformerEncoderLayer.

    state_dict: `q_proj.weight` and so on, as the linears have them, and bias_k, bias_v. in_proj_weight, in_proj_bias
    and q_proj_weight, k_proj_weight, v_proj_weight are dequantized copies, made when asked for; in_proj_weight is None
    where kdim or vdim is another than embed_dim.

    >>> import torch, pyqkern
    >>> attention = pyqkern.replace_linear(torch.nn.MultiheadAttention(64, 4))
    >>> x = torch.randn(10, 2, 64)
    >>> y, weights = attention(x, x, x)
    >>> y.shape, weights.shape, attention.q_proj.scheme.name
    (torch.Size([10, 2, 64]), torch.Size([2, 10, 10]), 'int8')
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a QMultiheadAttention is made of an nn.MultiheadAttention, by replace_linear")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention. is_causal is a hint: attn_mask says what it hides.

        Raises ValueError for nested tensors, is_causal without attn_mask, and shapes that do not belong together.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key and value must be padded tensors for a quantized attention, got a nested one; use "
                "x.to_padded_tensor(0.0) and a key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, which only says that it is causal, got None")
        check: Any = functional._mha_shape_check  # type: ignore[attr-defined]
        is_batched = check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        is_first = is_batched and self.batch_first  # the batch, before the sequence
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not is_batched:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not is_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if k.shape != v.shape or q.shape[0] != k.shape[0]:
            raise ValueError(
                "query, key and value must have one batch size, and key and value one length, got shapes "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        # Without a mask, scaled_dot_product_attention has a faster way for what is causal.
        causal = is_causal and not need_weights and key_padding_mask is None
        causal = causal and self.bias_k is None and not self.add_zero_attn
        mask = None if causal else self._mask(q, k, key_padding_mask, attn_mask)
        y, weights = self._attend(q, *self._extended(k, v), mask, need_weights, causal)
        y = self.out_proj((y.transpose(1, 2) if is_first else y.permute(2, 0, 1, 3)).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _mask(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores [batch, heads, L, S], S with what `_extended` adds; q, k [batch, L or S, E]."""
        batch, length, size = q.shape[0], q.shape[1], k.shape[1]
        masks = []
        if attn_mask is not None:
            shapes = ((length, size), (batch * self.num_heads, length, size))
            if attn_mask.shape not in shapes:
                raise ValueError(
                    f"attn_mask must be {list(shapes[0])} or {list(shapes[1])}, got {list(attn_mask.shape)}"
                )
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, self.num_heads)))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, size):
                raise ValueError(f"key_padding_mask must be {[batch, size]}, got {list(key_padding_mask.shape)}")
            masks.append(key_padding_mask[:, None, None])
        # True hides; floats are added.
        added = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
            if mask.dtype is torch.bool
            else mask.to(q.dtype)
            for mask in masks
        ]
        if not added:
            return None
        extra = (self.bias_k is not None) + self.add_zero_attn
        return functional.pad(added[0] if len(added) == 1 else added[0] + added[1], (0, extra))

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, S, E] with what the attention has behind them: bias_k and bias_v, and zeros."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.to(x.dtype).expand(len(x), -1, -1)], 1)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v [batch, L or S, E] -> [batch, heads, L, head_dim], and the weights [batch, heads, L, S]."""
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = functional.dropout(functional.softmax(scores if mask is None else scores + mask, -1), dropout)
        return weights @ v, weights

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PACKED:
            raise AttributeError(
                f"{name} of a quantized attention is a dequantized copy; assign q_proj.weight, k_proj.weight and "
                "v_proj.weight, or their bias, or change it before replace_linear"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in PACKED:
            return super().__getattr__(name)
        parts: list[Any] = [getattr(self._modules[one], name.rpartition("_")[2]) for one in INPUTS]
        if name[0] in "qkv":
            return parts[INPUTS.index(name.removesuffix("_weight"))]
        if parts[0] is None or len({part.shape for part in parts}) > 1:
            return None
        return read_from(torch.cat(parts), (), {})


def is_folded(module: Any) -> bool:
    """Whether it is an nn.MultiheadAttention, or of a subclass with such weights, that has no linears of its own."""
    if not isinstance(module, nn.MultiheadAttention) or isinstance(module, QMultiheadAttention):
        return False
    if not all(hasattr(module, name) for name in (*PACKED, "out_proj")):
        return False
    weight = module.in_proj_weight
    return weight is None or weight.shape[0] == 3 * module.embed_dim


def projections(attention: Any) -> dict[str, Projection]:
    """The projections of an nn.MultiheadAttention by name. Weights share memory with it, biases are copies."""
    size, training = attention.embed_dim, attention.training
    if attention.in_proj_weight is not None:
        weights = [(part, attention.in_proj_weight) for part in attention.in_proj_weight.detach().split(size)]
    else:
        weights = [(one.detach(), one) for one in (getattr(attention, f"{name}_weight") for name in INPUTS)]
    bias, found = attention.in_proj_bias, {}
    linear: Any
    for i, (name, (weight, of)) in enumerate(zip(INPUTS, weights, strict=True)):
        linear = Projection(weight.shape[1], size, bias=False, device="meta").train(training)
        linear.weight = nn.Parameter(weight, of.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[i * size : (i + 1) * size].clone(), bias.requires_grad)
        found[name] = linear
    if type(attention.out_proj) in OUTPUTS:
        linear = copy.copy(attention.out_proj)
        linear.__class__ = Projection
        found["out_proj"] = linear
    for name, linear in found.items():
        linear.place = (attention, name)
    return found


def unfold(attention: Any, own: bool = True) -> dict[str, Any]:
    """Makes an nn.MultiheadAttention a QMultiheadAttention of float linears, in place; returns its state before.

    own: whether their weights have memory of their own; otherwise it is the attention's.
    """
    before = vars(attention).copy()
    attention._parameters, attention._modules = attention._parameters.copy(), attention._modules.copy()
    linears: dict[str, Any] = projections(attention)
    for linear in linears.values():
        linear.__class__ = nn.Linear
        del linear.place
        if own and linear is not linears["out_proj"]:
            linear.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
    for name in PACKED:
        attention._parameters.pop(name, None)
    attention.__class__ = QMultiheadAttention
    attention._qkv_same_embed_dim = False  # what torch's fast paths ask for
    del attention._modules["out_proj"]
    attention._modules |= linears
    return before


def exchange(attention: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Gives it the state from before `unfold`, or from behind it; returns what it had."""
    before = vars(attention).copy()
    vars(attention).clear()
    vars(attention).update(state)
    attention.__class__ = QMultiheadAttention if "q_proj" in state["_modules"] else nn.MultiheadAttention
    return before


def fold(attention: Any) -> None:
    """The inverse of `unfold`, where all four are nn.Linear."""
    linears = [attention._modules.pop(name) for name in INPUTS]
    weights = [one.weight for one in linears]
    same = all(weight.shape == weights[0].shape for weight in weights)
    attention.__class__, attention._qkv_same_embed_dim = nn.MultiheadAttention, same
    attention.out_proj.__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    attention.register_parameter("in_proj_weight", _joined(weights) if same else None)
    attention.register_parameter("in_proj_bias", _joined([one.bias for one in linears]))
    for name, weight in zip(INPUTS, weights, strict=True):
        attention.register_parameter(f"{name}_weight", None if same else weight)


def _joined(parts: list[Any]) -> nn.Parameter | None:
    if parts[0] is None:
        return None
    return nn.Parameter(torch.cat([part.detach() for part in parts]), parts[0].requires_grad)


@contextmanager
def unfolded(attentions: Iterable[Any]) -> Iterator[None]:
    """They are QMultiheadAttentions of float linears for a while, so that hooks see what these are called with."""
    before = [(attention, unfold(attention, own=False)) for attention in attentions]
    try:
        yield
    finally:
        for attention, state in before:
            exchange(attention, state)
