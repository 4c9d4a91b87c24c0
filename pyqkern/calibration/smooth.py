"""smooth: moves outliers from activations into weights, without changing what the model computes.

Between two layers, what comes out of the first in channel j is divided by s[j], and the second's column j is multiplied
by it: s[j] = absmax(activation[j])**alpha / absmax(weight[:, j])**(1 - alpha), from Xiao et al., "SmoothQuant", 2022.
s is rounded to powers of two, so that the float model gives the same bits as before.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pyqkern.models.find import as_linear, conv1d, find_linears
from pyqkern.models.layouts import find_layouts
from pyqkern.nn.attention import Projection, is_folded, unfold
from pyqkern.nn.fused_parts import InputScale, Path
from pyqkern.schemes import Range, check_type


@dataclass(frozen=True)
class Pair:
    """A layer and the linears that read its output channels one to one, all by qualified name.

    before: an nn.Linear, nn.LayerNorm or another module with a weight (and a bias) per output channel, into which 1/s
    goes. With shared=True something else reads the same output too, as the residual branch behind a BERT's LayerNorm
    does: then `before` keeps its weight, and x * (1/s) is computed in front of each of the linears.
    """

    before: str
    after: tuple[str, ...]
    shared: bool = False


def find_pairs(model: nn.Module) -> list[Pair]:
    """The pairs of each encoder layer with the parts of a BERT, DistilBERT, ALBERT or MPNet, wherever in the model.

    Where q, k and v read the output of the LayerNorm of the layer before, `before` is "": no weight of it is changed.
    """
    pairs = []
    for name, layout in find_layouts(model):
        query, key, value, output, up, _ = (_join(name, path) for path in layout.linears)
        pairs.append(Pair("", (query, key, value), shared=True))
        pairs.append(Pair(value, (output,)))
        pairs.append(Pair(_join(name, layout.norms[0]), (up,), shared=True))
    return pairs


def _join(prefix: str, path: Path) -> str:
    return ".".join((prefix, *path) if prefix else path)


def smooth(
    model: nn.Module,
    ranges: Mapping[str, Range],
    alpha: float = 0.5,
    *,
    pairs: Iterable[Pair] | None = None,
    shared: bool = True,
) -> list[Pair]:
    """Smooths a float model in place and returns the pairs it treated. To be done before replace_linear.

    ranges: of each input channel, from `calibrate(model, batches, "minmax", per_channel=True)`, of this very model.
    alpha: how much of the difficulty goes from the activations into the weights, within [0, 1].
    pairs: which layers; by default those of `find_pairs`, which knows every family that `optimize` knows.
    shared: False leaves out the pairs whose scale costs a multiplication at run time, and keeps those that are free:
    in a BERT, V and the output projection.

    An nn.MultiheadAttention whose projections a pair names becomes a QMultiheadAttention of float linears.
    In front of shared pairs' linears stands a hook (`InputScale`), which torch.save(model) keeps and a state_dict does
    not. Raises ValueError for pairs that do not fit, ranges that lack a linear or are not per channel, and for a model
    in which no pair is known; nothing has been changed then.

    >>> import torch, pyqkern
    >>> from pyqkern.calibration.smooth import Pair
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    >>> ranges = pyqkern.calibrate(model, [torch.randn(16, 8)], "minmax", per_channel=True, progress=False)
    >>> pyqkern.smooth(model, ranges, pairs=[Pair("0", ("1",))])
    [Pair(before='0', after=('1',), shared=False)]
    """
    check_type("model", model, nn.Module, "an nn.Module")
    check_type("ranges", ranges, Mapping, "a mapping of names to Range, as calibrate returns it")
    check_type("alpha", alpha, Real, "a number")
    check_type("shared", shared, bool, "a bool")
    check_type("pairs", pairs, (Iterable, type(None)), "None or several Pair")
    for pair in pairs or ():
        check_type("pairs", pair, Pair, "None or several Pair")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], got {alpha}")
    chosen = list(find_pairs(model) if pairs is None else pairs)
    if not chosen:
        raise ValueError(
            f"pairs must name the layers of this model: none are known in {type(model).__name__}; "
            'give pairs=[Pair("norm", ("linear", ...)), ...]'
        )
    chosen = [pair for pair in chosen if shared or not pair.shared]
    modules = dict(model.named_modules())
    modules |= {name: layer.module for layer in find_linears(model) for name in layer.names}
    done: set[int] = set()
    work = []
    for pair in chosen:
        linears = [_linear(modules, name) for name in pair.after]
        key = id(linears[0])
        if key in done:  # ALBERT: one layer under many names
            continue
        done.add(key)
        views = [as_linear(linear) for linear in linears]
        before = None if pair.shared else _before(modules, pair, views[0].in_features)
        work.append((before, linears, scales(pair, views, ranges, alpha)))
    with torch.no_grad():
        for before, linears, scale in work:
            _apply(None if before is None else _in_place(before), [_in_place(linear) for linear in linears], scale)
    return chosen


def _linear(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The nn.Linear or Conv1D of that name."""
    module = modules.get(name)
    if type(module) not in (nn.Linear, Projection, conv1d()):
        what = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"a pair's linears must be nn.Linear in the model, got {what} of the name {name!r}")
    return module


def _in_place(module: nn.Module) -> nn.Module:
    """The module itself, or the linear in the attention that a projection is of, which gets it."""
    if not isinstance(module, Projection):
        return module
    attention, name = module.place
    if is_folded(attention):
        unfold(attention)
    linear: nn.Module = attention._modules[name]
    return linear


def _before(modules: Mapping[str, nn.Module], pair: Pair, channels: int) -> nn.Module:
    module = modules.get(pair.before)
    if module is not None and type(module) is conv1d():
        module = as_linear(module)
    weight = None if module is None else module._parameters.get("weight")
    if module is None or weight is None or weight.shape[0] != channels:
        got = "no such module" if module is None else "no weight" if weight is None else f"weight {tuple(weight.shape)}"
        raise ValueError(f"{pair.before!r} must have a weight [{channels}, ...] for {pair.after[0]!r}, got {got}")
    return module


def scales(pair: Pair, linears: Sequence[nn.Linear], ranges: Mapping[str, Range], alpha: float) -> Tensor:
    """s, fp32 [channels]: powers of two, so that multiplying and dividing by them changes no mantissa."""
    name, channels = pair.after[0], linears[0].in_features
    if any(linear.in_features != channels for linear in linears):
        raise ValueError(f"the linears of a pair must have the same in_features, got {pair.after}")
    if name not in ranges:
        raise ValueError(f"ranges must have {name!r}, which calibration did not reach; leave its pair out")
    activation = ranges[name].absmax
    if activation.shape != (channels,):
        raise ValueError(
            f"ranges[{name!r}] must be per channel [{channels}], got {list(activation.shape)}; "
            'calibrate(model, batches, "minmax", per_channel=True)'
        )
    weight = torch.stack([linear.weight.detach().float().abs().amax(0) for linear in linears]).amax(0).cpu()
    used = (activation > 0) & (weight > 0)
    scale = activation.clamp(min=1e-5).pow(alpha) / weight.clamp(min=1e-5).pow(1 - alpha)
    # What all channels have in common would only move the range as a whole.
    center = scale[used].log2().mean() if used.any() else 0.0
    return torch.where(used, torch.exp2((scale.log2() - center).round().clamp(-20, 20)), 1.0)


def _apply(before: nn.Module | None, linears: Sequence[nn.Module], scale: Tensor) -> None:
    for linear in linears:
        weight = as_linear(linear).weight  # of a Conv1D a transposed view
        weight.mul_(scale.to(weight))
        if before is None:
            linear.register_forward_pre_hook(InputScale(1 / scale), with_kwargs=True)
    if before is not None:
        for parameter in (before._parameters["weight"], before._parameters.get("bias")):
            if parameter is not None:
                s = scale.to(parameter)
                parameter.div_(s.view(-1, *[1] * (parameter.dim() - 1)))
