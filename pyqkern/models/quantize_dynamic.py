"""quantize_dynamic, which takes what torch.ao.quantization.quantize_dynamic takes."""

import copy
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyqkern.models.find import RECURRENT, linear_types
from pyqkern.models.recurrent import replace_recurrent
from pyqkern.models.replace import replace_embedding, replace_linear
from pyqkern.nn.attention import INPUTS, is_folded
from pyqkern.nn.embedding import EMBEDDINGS
from pyqkern.schemes import Scheme, check_type, get_scheme

# What torch quantizes when it is told nothing; nn.RNN is not among them.
DEFAULT = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)

_BY_DTYPE = {torch.qint8: "int8", torch.quint8: "int8", torch.quint4x2: "nf4", torch.float16: "float16"}
_MISSING = object()

Config = Scheme | None


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[Any, Any] | Set[Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: None = None,
    inplace: bool = False,
) -> nn.Module:
    """What torch.quantization.quantize_dynamic did, with pyqkern's layers; returns a copy in eval mode.

    qconfig_spec: None for nn.Linear, nn.LSTM, nn.GRU and the three cells; a set of types and names of modules; or a
    dict from these to a scheme ("int8", "nf4", ... or a scheme object), a dynamic qconfig of torch, or None to leave it
    in float. As in torch an entry holds for all that is inside of the module, the entry of a name comes before that of
    a type, that of a module before that of its parent, and a `qconfig` on the module itself before all. Embeddings are
    quantized where nn.Embedding, nn.EmbeddingBag or their own name is given, nn.MultiheadAttention and nn.RNN where
    they, or the name or type of a module around them, are. Layers of other types, convolutions among them, stay as they
    are.
    dtype: torch.qint8, the scheme "int8"; torch.quint8, the same for embeddings; torch.quint4x2, "nf4" for
    nn.EmbeddingBag; torch.float16, "float16". Without meaning beside a dict.
    mapping: None. inplace: changes the model itself instead of a copy.

    What is kept in float has its reason in `summary`. Raises ValueError for what cannot be honoured: other dtypes,
    static qconfigs, a mapping, a name that no module has; otherwise as `replace_linear`.

    >>> import torch, pyqkern
    >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(40, 32), "out": torch.nn.Linear(32, 8)})
    >>> quantized = pyqkern.quantize_dynamic(model, {torch.nn.LSTM, torch.nn.Linear}, dtype=torch.qint8)
    >>> type(quantized["rnn"]).__name__, type(quantized["out"]).__name__, type(model["out"]).__name__
    ('QLSTM', 'Int8Linear', 'Linear')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if mapping is not None:
        raise ValueError("mapping must be None: the layers are pyqkern's own; choose among them by qconfig_spec")
    check_type("dtype", dtype, torch.dtype, "a torch.dtype")
    check_type("inplace", inplace, bool, "a bool")
    spec = _spec(qconfig_spec, dtype)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for key in spec:
        if isinstance(key, str) and key not in names:
            raise ValueError(f"qconfig_spec must hold names of modules, got {key!r}; see model.named_modules()")
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    chosen: dict[Scheme, dict[str, nn.Module]] = {}
    for name, module, config in _configs(model, spec):
        asked = not isinstance(module, (*EMBEDDINGS,)) or type(module) in spec or name in spec
        if config is not None and asked:
            inside = INPUTS if is_folded(module) else ()  # projections, which are no modules yet
            found = (name, *(f"{name}.{one}" if name else one for one in inside))
            chosen.setdefault(config, {}).update(dict.fromkeys(found, module))
    for scheme, modules in chosen.items():
        for replace, types in (
            (replace_linear, (*linear_types(), nn.MultiheadAttention)),
            (replace_embedding, (*EMBEDDINGS,)),
            (replace_recurrent, RECURRENT),
        ):
            wanted = {name for name, module in modules.items() if isinstance(module, types)}
            if wanted:
                model = replace(model, scheme, include=lambda name, _, wanted=wanted: name in wanted)
    return model


def _spec(given: Mapping[Any, Any] | Set[Any] | None, dtype: torch.dtype) -> dict[Any, Config]:
    """Types and names of modules -> their scheme."""
    if isinstance(given, Mapping):
        pairs = {key: _config(key, value) for key, value in given.items()}
    elif given is None or isinstance(given, Set):
        scheme = get_scheme(_of_dtype("dtype", dtype))
        kinds = {torch.quint8: (*EMBEDDINGS,), torch.quint4x2: (nn.EmbeddingBag,)}.get(dtype, DEFAULT)
        pairs = dict.fromkeys(kinds if given is None else given, scheme)
    else:
        raise TypeError(f"qconfig_spec must be a set, a dict or None, got {type(given).__name__}")
    for key in pairs:
        if not isinstance(key, str | type):
            raise TypeError(f"qconfig_spec must hold types and names of modules, got {key!r}")
    return pairs


def _of_dtype(argument: str, dtype: Any) -> str:
    if dtype not in _BY_DTYPE:
        kinds = ", ".join(str(kind) for kind in _BY_DTYPE)
        raise ValueError(f"{argument} must be one of {kinds}, got {dtype}")
    return _BY_DTYPE[dtype]


def _config(key: Any, value: Any) -> Config:
    """A scheme of its name, of a scheme object or of a qconfig of torch."""
    if value is None or isinstance(value, Scheme | str):
        return None if value is None else get_scheme(value)
    if not callable(getattr(value, "weight", None)) or not callable(getattr(value, "activation", None)):
        raise TypeError(f"qconfig_spec[{key!r}] must be a scheme, a qconfig of torch or None, got {value!r}")
    weight, activation = value.weight(), value.activation()
    placeholder = type(activation).__name__ in ("PlaceholderObserver", "NoopObserver")
    if not placeholder and not getattr(activation, "is_dynamic", False):
        raise ValueError(
            f"qconfig_spec[{key!r}] must be a dynamic qconfig, got activations of {type(activation).__name__}; use "
            'replace_linear(model, "int8-static", ranges=pyqkern.calibrate(model, batches))'
        )
    return get_scheme(_of_dtype(f"the weight of qconfig_spec[{key!r}]", weight.dtype))


def _configs(model: nn.Module, spec: Mapping[Any, Config]) -> Iterator[tuple[str, nn.Module, Config]]:
    """Every module with its name and what it inherits or has."""

    def walk(module: nn.Module, name: str, config: Config, path: tuple[nn.Module, ...]) -> Iterator[Any]:
        config = spec.get(parametrize.type_before_parametrizations(module), config)
        config = spec.get(name, config)
        own = vars(module).get("qconfig", _MISSING)
        config = config if own is _MISSING else _config(name, own)
        yield name, module, config
        for child_name, child in module._modules.items():
            if child is not None and not any(child is one for one in path):
                yield from walk(child, f"{name}.{child_name}" if name else child_name, config, (*path, child))

    return walk(model, "", None, (model,))
