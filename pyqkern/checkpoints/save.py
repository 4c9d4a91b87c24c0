"""What of a model goes into files: which layers are quantized how, and their tensors in a format."""

from torch import Tensor, nn

from pyqkern.checkpoints.formats.base import Format
from pyqkern.checkpoints.layers import Group
from pyqkern.models.find import find_layers, linear_types
from pyqkern.nn.attention import QMultiheadAttention
from pyqkern.nn.embedding import QEmbedding
from pyqkern.nn.experts import QExperts
from pyqkern.nn.fused_parts import InputScale
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.schemes import Scheme


def describe(model: nn.Module) -> list[Group]:
    """The model's groups, by the names that its layers have in it. The last, without a scheme, is of what is kept."""
    groups: dict[Scheme, Group] = {}

    def group(scheme: Scheme) -> Group:
        return groups.setdefault(scheme, Group(scheme))

    tables: dict[int, str] = {}
    for layer in find_layers(model, (QEmbedding,)):
        table, name = layer.module.table, layer.names[0]
        group(table.scheme).embeddings[name] = tables.setdefault(id(table), f"{name}.table")
    for layer in find_layers(model, (QRecurrent,)):
        group(layer.module.scheme).recurrent.append(layer.names[0])
    kept = Group(None)
    for layer in find_layers(model, linear_types()):
        name, module = layer.names[0], layer.module
        if id(module) in tables:
            group(module.scheme).heads[name] = tables[id(module)]
        elif isinstance(module, QLinear):
            group(module.scheme).linears.append(name)
        else:
            kept.linears.append(name)
    for layer in find_layers(model, (QExperts,)):
        for key, linear in layer.module.linears():
            group(linear.scheme).linears.append(f"{layer.names[0]}.{key}")
    return [*groups.values(), kept]


def input_scales(model: nn.Module) -> dict[str, list[float]]:
    """By the names of linears, quantized or not: the factors in front of them that `smooth` or a plan has left."""
    found = {}
    for layer in find_layers(model, linear_types()):
        scales = [hook for hook in layer.module._forward_pre_hooks.values() if type(hook) is InputScale]
        if len(scales) > 1:
            raise ValueError(
                f"{layer.names[0]} was smoothed {len(scales)} times, of which files hold one; smooth it once"
            )
        if scales:
            found[layer.names[0]] = scales[0].factor.cpu().tolist()
    return found


def state_dict(model: nn.Module, format: Format) -> dict[str, Tensor]:
    """The model's state_dict with the quantized layers in a format; what an embedding and its head share, once.

    Raises ValueError, before anything is written, for a layer that the format cannot hold.
    """
    tensors = dict(model.state_dict())

    def drop(prefix: str, *but: str) -> None:
        for key in [key for key in tensors if key.startswith(prefix) and key.removeprefix(prefix) not in but]:
            del tensors[key]

    if format.linears_only:
        for layer in find_layers(model, (QEmbedding, QRecurrent, QMultiheadAttention, QExperts)):
            kind, name = type(layer.module).__name__, layer.names[0]
            raise ValueError(
                f"{format.name} has quantized linears alone, but {name} is a {kind}; use "
                "format='pyqkern', or leave it in float"
            )
        if scaled := input_scales(model):
            raise ValueError(
                f"{format.name} has no place for what the input of {next(iter(scaled))} is multiplied by, since it was "
                "smoothed; use format='pyqkern', or smooth(..., shared=False)"
            )
    for layer in find_layers(model, (QRecurrent,)):
        for name in layer.names[1:]:
            drop(f"{name}.")
    tables: set[int] = set()
    for layer in find_layers(model, (QEmbedding,)):
        first = layer.names[0]
        for name in layer.names:
            if name != first or id(layer.module.table) in tables:
                drop(f"{name}.table.")
        tensors.pop(f"{first}.table.bias", None)
        tables.add(id(layer.module.table))
    for layer in find_layers(model, (QLinear,)):
        for name in layer.names:
            if id(layer.module) in tables:
                drop(f"{name}.", "bias")
                continue
            format.check(name, layer.module.scheme)
            prefix = f"{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            drop(prefix)
            tensors |= {prefix + key: value for key, value in format.encode(layer.module, own).items()}
    return tensors
