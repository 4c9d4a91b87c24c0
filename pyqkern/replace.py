"""replace_linear, which quantizes a model in place, and summary, which says what became of each linear."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pyqkern.qlinear import QLinear
from pyqkern.schemes import Scheme, get_scheme

Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Where replace_linear leaves the reason on an nn.Linear that it kept.
_REASON = "_pyqkern_kept"

# Where optimize leaves the reason on an encoder layer that it did not fuse.
UNFUSED = "_pyqkern_unfused"

# What hooks on a module are made of. The quantized layer takes over the very dicts, so that handles stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class _Linear:
    """One nn.Linear or QLinear of a model, and everywhere it is used."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


def replace_linear(
    model: nn.Module,
    scheme: str | Scheme = "int8",
    *,
    include: Pattern | None = None,
    exclude: Pattern = (),
) -> nn.Module:
    """Replaces the linears of `model` by quantized ones, in place, and returns it; a bare nn.Linear gives a QLinear.

    scheme: a name, or a scheme object where its defaults do not do (see `pyqkern.schemes`).
    include, exclude: which linears, as name patterns (fnmatch on the qualified name, "encoder.*.dense") or a predicate
    (name, module) -> bool. exclude wins. A linear with several names is one module, and any of its names counts.

    Kept in float, with the reason in `summary`: what is excluded; a weight shared with an embedding or another module;
    a parametrized or patched layer; a subclass of nn.Linear (nn.MultiheadAttention reads the weight of its own). A
    linear used in two places stays one shared module. Hooks, train mode and the bias's requires_grad carry over.

    Raises ValueError for a scheme that does not exist, a pattern that matches no linear, NaN or infinite weights, or a
    layer too wide for the scheme, and TypeError for dtypes, each naming the layer. Every layer is quantized once on
    trial before the first is changed, so that after such an error the model is as it was. What is left to stop the
    second pass is an interrupt or the lack of memory; the model then works with the layers done so far quantized, and
    calling again completes it. Extra memory: about one layer, since each float weight is dropped as its layer is done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    scheme = get_scheme(scheme)
    linears = _find_linears(model)
    reasons = _reasons(model, linears, include, exclude)
    reasons = [
        reason if reason is not None else scheme.reason_to_keep(linear.names)
        for linear, reason in zip(linears, reasons, strict=True)
    ]
    chosen = [linear for linear, reason in zip(linears, reasons, strict=True) if reason is None]
    for linear in chosen:
        _quantized(linear, scheme)
    for linear, reason in zip(linears, reasons, strict=True):
        if reason is not None and not isinstance(linear.module, QLinear):
            setattr(linear.module, _REASON, reason)
    result = model
    for linear in chosen:
        module = _quantized(linear, scheme)
        for parent, attribute in linear.places:
            parent._modules[attribute] = module
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fused path would multiply with the dequantized weights instead of calling the layers.
                parent.activation_relu_or_gelu = 0
        if linear.module is model:
            result = module
        linear.module = module
    return result


def _quantized(linear: _Linear, scheme: Scheme) -> QLinear:
    """The quantized layer, with the hooks of the float one. Errors name the layer."""
    assert isinstance(linear.module, nn.Linear)
    try:
        module = QLinear.from_linear(linear.module, scheme.for_layer(linear.names))
    except (TypeError, ValueError) as error:
        name = linear.names[0]
        message = f"{name}: {error}; or leave it in float with exclude={[name]}" if name else str(error)
        raise (ValueError if isinstance(error, ValueError) else TypeError)(message) from error
    for hooks in _HOOKS:
        setattr(module, hooks, getattr(linear.module, hooks))
    return module


def _find_linears(model: nn.Module) -> list[_Linear]:
    """Every nn.Linear and QLinear, each once, in the order of their first names."""
    found: dict[int, _Linear] = {}
    for name, parent, attribute, module in _walk(model, "", (model,)):
        linear = found.setdefault(id(module), _Linear(module))
        linear.names.append(name)
        if (parent, attribute) not in linear.places:
            linear.places.append((parent, attribute))
    if isinstance(model, nn.Linear | QLinear):
        found.setdefault(id(model), _Linear(model, [""]))
    return list(found.values())


def _walk(
    module: nn.Module, prefix: str, path: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(qualified name, parent, attribute, linear) under every name; modules that hold themselves are not followed."""
    for attribute, child in module._modules.items():
        if child is None or any(child is ancestor for ancestor in path):
            continue
        if isinstance(child, nn.Linear | QLinear):
            yield prefix + attribute, module, attribute, child
        yield from _walk(child, f"{prefix}{attribute}.", (*path, child))


# ---- which linears are replaced


def _reasons(model: nn.Module, linears: list[_Linear], include: Pattern | None, exclude: Pattern) -> list[str | None]:
    """Why each linear is kept; None where it is to be replaced."""
    included = [True] * len(linears) if include is None else _matches("include", include, linears)
    excluded = _matches("exclude", exclude, linears)
    owners = _weight_owners(model)
    reasons: list[str | None] = []
    for linear, take, leave in zip(linears, included, excluded, strict=True):
        reason = _structural_reason(linear.module, owners)
        if reason is None and leave:
            reason = "excluded"
        if reason is None and not take:
            reason = "not included"
        reasons.append(reason)
    return reasons


def _matches(argument: str, pattern: Pattern, linears: list[_Linear]) -> list[bool]:
    """Which linears a pattern picks. A pattern that picks none is a mistake and raises."""
    if callable(pattern):
        return [any(pattern(name, linear.module) for name in linear.names) for linear in linears]
    patterns = [pattern] if isinstance(pattern, str) or not isinstance(pattern, Iterable) else list(pattern)
    names = [name for linear in linears for name in linear.names]
    for one in patterns:
        if not isinstance(one, str):
            raise TypeError(f"{argument} must be name patterns or a predicate (name, module), got {one!r}")
        if not any(fnmatchcase(name, one) for name in names):
            inside = any(name.startswith(one + ".") for name in names)
            hint = f"use {one + '.*'!r} for what is inside of it" if inside else f"the linears are {_some(names)}"
            raise ValueError(f"{argument} must match the name of a linear, got {one!r}; {hint}")
    return [any(fnmatchcase(name, one) for name in linear.names for one in patterns) for linear in linears]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def _weight_owners(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The address of each parameter of a module that is no linear -> its name and the module."""
    return {
        parameter.data_ptr(): (f"{name}.{key}" if name else key, module)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | QLinear)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.numel() and not parameter.is_meta
    }


def _structural_reason(module: nn.Module, owners: dict[int, tuple[str, nn.Module]]) -> str | None:
    """Why this linear cannot be replaced, whatever the patterns say."""
    if isinstance(module, QLinear):
        return "already quantized"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "parametrized: its weight is computed from other parameters"
    if type(module) is not nn.Linear:
        return f"subclass of nn.Linear: {type(module).__name__}, whose owner may read its weight"
    if "forward" in vars(module):
        return "patched: its forward was replaced"
    owner = owners.get(weight.data_ptr()) if weight.numel() and not weight.is_meta else None
    if owner is not None:
        name, holder = owner
        return f"tied to {'the embedding ' if isinstance(holder, nn.Embedding) else ''}{name}"
    return None


# ---- what became of them


@dataclass(frozen=True)
class LinearRecord:
    """One linear: its names (several where it is shared), weight shape, and bytes as nn.Linear and as it is now."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, int]
    scheme: str | None
    reason: str | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class LayerRecord:
    """One encoder layer that `optimize` has seen: None as reason where it is one operator, else why it is not."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """The linears of a model, one record each, and the totals; prints as a table. `layers`: what `optimize` fused.

    Bytes are counted from the tensors themselves, each once. `bytes_before` is what the same layers take as nn.Linear
    in the model's dtype. `other_bytes` is everything that is no linear: embeddings, norms, buffers.
    """

    records: list[LinearRecord]
    other_bytes: int
    layers: list[LayerRecord] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """The whole model with every linear in float."""
        return self.other_bytes + sum(record.bytes_before for record in self.records)

    @property
    def bytes_after(self) -> int:
        """The whole model as it is."""
        return self.other_bytes + sum(record.bytes_after for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON or a data frame."""
        return {
            "records": [asdict(record) for record in self.records],
            "layers": [asdict(record) for record in self.layers],
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        rows = [("linear", "shape", "scheme", "before", "after")]
        for record in self.records:
            name = record.name or "(the model)"
            if record.aliases:
                name += f" (= {', '.join(record.aliases)})"
            shape = "x".join(str(size) for size in record.shape)
            what = record.scheme or f"kept: {record.reason}"
            rows.append((name, shape, what, _bytes(record.bytes_before), _bytes(record.bytes_after)))
        quantized = sum(record.scheme is not None for record in self.records)
        other, before, after = self.other_bytes, self.bytes_before, self.bytes_after
        title = f"{quantized} of {len(self.records)} linears quantized"
        for total, b, a in (
            (title, before - other, after - other),
            ("everything else", other, other),
            ("the model", before, after),
        ):
            rows.append((total, "", "", _bytes(b), _bytes(a)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-3], rule, *lines[-3:], *self._layer_lines()])

    def _layer_lines(self) -> list[str]:
        if not self.layers:
            return []
        fused = sum(record.reason is None for record in self.layers)
        kept = [f"{record.name} not fused: {record.reason}" for record in self.layers if record.reason is not None]
        return [f"{fused} of {len(self.layers)} encoder layers are one operator each", *kept]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"


def summary(model: nn.Module) -> Summary:
    """Every linear of the model: name, shape, scheme or reason it is kept, bytes before and after; and the totals."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    owners = _weight_owners(model)
    counted: set[tuple[int, int]] = set()
    records = [_record(linear, owners, counted) for linear in _find_linears(model)]
    other_bytes = sum(_count(module, counted) for module in model.modules())
    layers = [
        LayerRecord(name, vars(module).get(UNFUSED))
        for name, module in model.named_modules()
        if UNFUSED in vars(module) or getattr(module, "is_fused", False)
    ]
    return Summary(records, other_bytes, layers)


def _record(linear: _Linear, owners: dict[int, tuple[str, nn.Module]], counted: set[tuple[int, int]]) -> LinearRecord:
    module = linear.module
    out_features, in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    after = sum(_count(part, counted) for part in module.modules())
    if isinstance(module, QLinear):
        scheme, reason = module.scheme.name, None
        bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
        before = out_features * in_features * module.dtype.itemsize + bias
    else:
        scheme, before = None, after
        reason = _structural_reason(module, owners) or getattr(module, _REASON, "not replaced yet")
    return LinearRecord(
        linear.names[0], tuple(linear.names[1:]), (out_features, in_features), scheme, reason, before, after
    )


def _count(module: nn.Module, counted: set[tuple[int, int]]) -> int:
    """Bytes of the module's own tensors, those that have been counted already left out."""
    total = 0
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None:
            continue
        key = (id(tensor), 0) if tensor.is_meta or not tensor.numel() else (tensor.data_ptr(), tensor.numel())
        if key not in counted:
            counted.add(key)
            total += tensor.numel() * tensor.element_size()
    return total
