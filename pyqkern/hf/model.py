"""What a model of transformers has to know of its quantized layers beside loading and saving.

`attach` is called with every model whose layers were replaced, and with every one that was loaded. It gives the models
in it an `hf_quantizer`, a placeholder where no parameter is left, resize_token_embeddings for quantized layers, and has
load_state_dict read the keys and formats of files, with which the Trainer resumes.
"""

import copy
import functools
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pyqkern.checkpoints.formats import FORMATS, get_format
from pyqkern.hf import accelerate
from pyqkern.hf.names import V4, in_model
from pyqkern.hf.slots import SLOTS, EmbeddingSlot, HeadSlot
from pyqkern.hf.transformers4 import tie_nothing
from pyqkern.models.find import find_layers
from pyqkern.models.replace import put
from pyqkern.nn.attention import QMultiheadAttention, fold
from pyqkern.nn.embedding import QEmbedding
from pyqkern.nn.experts import QExperts
from pyqkern.nn.linear import QLinear
from pyqkern.nn.recurrent import QRecurrent
from pyqkern.ops.checks import FLOATS

PLACEHOLDER = "pyqkern_placeholder"


def equip(module: Any) -> None:
    """Everything but the hf_quantizer, once, for a PreTrainedModel with quantized layers."""
    untie(module)
    if "accelerate" in sys.modules:
        accelerate.teach()
    if not isinstance(module.__dict__.get("resize_token_embeddings"), functools.partial):
        # A partial is copied and pickled with the model that it holds; a bound method would be lost.
        module.resize_token_embeddings = functools.partial(_resize_token_embeddings, module)
        module.register_load_state_dict_pre_hook(_read_as_in_files)
    if next(module.parameters(), None) is None:
        _put_placeholder(module)


def give_config(model: Any) -> Any:
    """Gives the model a copy of its config, which other models may share, to say there how this one is quantized."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def say_float(model: Any) -> None:
    """Takes from a model in float what its config says of another, quantized one's layers.

    It stays where the model has tensors of another kind, which a library may have quantized that is not asked here.
    """
    said = model.config.quantization_config
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    plain = (*FLOATS, torch.float64, torch.int64, torch.bool)
    if method in FORMATS and all(tensor.dtype in plain for tensor in model.state_dict().values()):
        del give_config(model).quantization_config


# ---- models of which no parameter is left


def _put_placeholder(module: Any) -> None:
    """A parameter without elements, which tells `device` and `dtype` of the model, and is in no state_dict."""
    layer = next(one for one in module.modules() if isinstance(one, QLinear))
    device = next(buffer.device for buffer in layer.buffers())
    values = torch.empty(0, dtype=layer.dtype, device=device)
    module.register_parameter(PLACEHOLDER, nn.Parameter(values, requires_grad=False))
    module.register_state_dict_post_hook(_drop_placeholder)
    module.register_load_state_dict_post_hook(_miss_no_placeholder)


def _drop_placeholder(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(prefix + PLACEHOLDER, None)


def _miss_no_placeholder(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(PLACEHOLDER)]


# ---- load_state_dict with what is in files


def _read_as_in_files(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Puts the model's own keys and tensors in place of those of a file that save_pretrained wrote.

    The Trainer resumes, and reloads its best model, by load_state_dict. Only the model that was saved is called with an
    empty prefix; the models in it then find their keys as they are.
    """
    if prefix:
        return
    format = get_format(module.hf_quantizer.quantization_config.format)
    layers = {name: layer.module for layer in find_layers(module, (QLinear,)) for name in layer.names}
    wanted = [f"{name}.{key}" for name, layer in layers.items() for key in format.stored(layer)]
    for key, name in in_model(module, list(state_dict), [*module.state_dict(), *wanted]).items():
        if key != name:
            state_dict[name] = state_dict.pop(key)
    for name, layer in layers.items():
        stored = {key: state_dict.get(f"{name}.{key}") for key in format.stored(layer)}
        found = {key: value for key, value in stored.items() if isinstance(value, Tensor)}
        if not format.differs(found):
            continue
        for key in found:
            del state_dict[f"{name}.{key}"]
        try:
            state_dict |= {f"{name}.{key}": value for key, value in format.read(name, layer, found).items()}
        except (KeyError, ValueError) as error:
            error_msgs.append(f"{name}: {error}")


# ---- resize_token_embeddings


def _resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """transformers' own; a quantized embedding, and a quantized output head, are first put back into float.

    So the values of the tokens that were there stay what they were. A warning says so.
    """
    resize = functools.partial(type(model).resize_token_embeddings, model)
    quantized = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if _is_quantized(one)]
    if (new_num_tokens is None and not args and not kwargs) or not quantized:
        return resize(new_num_tokens, *args, **kwargs)
    changed = dequantize(model, [*quantized, *(one.table for one in quantized if isinstance(one, QEmbedding))])
    retie(model)
    try:
        resized = resize(new_num_tokens, *args, **kwargs)
    except BaseException:
        for layer, module in changed:
            put(layer, module, model)
        untie(model)
        raise
    warnings.warn(
        "resize_token_embeddings put the quantized embeddings and output head back into float; quantize them again "
        "with pyqkern.replace_embedding and replace_linear when the new tokens are trained",
        stacklevel=2,
    )
    untie(model)
    return resized


def _is_quantized(module: Any) -> bool:
    return isinstance(module, QLinear | QEmbedding)


def dequantize(model: nn.Module, modules: list[Any] | None = None) -> list[tuple[Any, nn.Module]]:
    """Puts float layers in the places of quantized ones, or of `modules` of them; returns what was where.

    An embedding and the head that is its table share their weight again.
    """
    weights: dict[int, nn.Parameter] = {}
    changed: list[tuple[Any, nn.Module]] = []
    for layer in find_layers(model, (QLinear, QEmbedding, QRecurrent, QExperts)):
        module = layer.module
        if modules is not None and not any(module is one for one in modules):
            continue
        if isinstance(module, QRecurrent | QExperts):
            put(layer, module.in_float(), model)
            changed.append((layer, module))
            continue
        table = module.table if isinstance(module, QEmbedding) else module
        weight = weights.setdefault(id(table), nn.Parameter(module.weight.clone()))
        put(layer, _in_float(module, weight), model)
        changed.append((layer, module))
    for layer in find_layers(model, (QMultiheadAttention,)):
        if all(type(one) is nn.Linear for one in layer.module.children()):
            fold(layer.module)
    return changed


def _in_float(module: QLinear | QEmbedding, weight: nn.Parameter) -> nn.Module:
    if isinstance(module, QEmbedding):
        return module.in_float(weight)
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta").train(module.training)
    linear.weight, linear.bias = weight, module.bias  # type: ignore[assignment]
    return linear


# ---- weights that transformers ties

_TIED = ("all_tied_weights_keys", "_tied_weights_keys")


def untie(model: Any) -> None:
    """Takes quantized layers off the list of weights that transformers ties: there is no Parameter to set any more."""

    def quantized(name: str) -> bool:
        path = name.rpartition(".")[0]
        try:
            return isinstance(model.get_submodule(path), (QLinear, QEmbedding, *SLOTS))
        except AttributeError:
            return False

    for attribute in _TIED:
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict):
            left = {
                target: source for target, source in tied.items() if not quantized(target) or target.endswith("bias")
            }
            if len(left) < len(tied):
                setattr(model, attribute, left)
    if V4 and find_layers(model, (QEmbedding, EmbeddingSlot, HeadSlot)):
        model._tie_or_clone_weights = tie_nothing


def retie(model: Any) -> None:
    """Has transformers tie what it ties by itself, where layers are in float again."""
    for attribute in ("_tied_weights_keys", "_tie_or_clone_weights"):
        model.__dict__.pop(attribute, None)
    if not V4:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def dequantize_heads(model: nn.Module, names: set[str]) -> list[str]:
    """Puts the quantized linears under modules of these last names into float; returns which those were."""
    heads = [
        layer
        for layer in find_layers(model, (QLinear,))
        if any(not names.isdisjoint(name.split(".")) for name in layer.names)
    ]
    dequantize(model, [layer.module for layer in heads])
    return [layer.names[0] for layer in heads]


def models_in(model: nn.Module) -> list[Any]:
    """The models of transformers in `model` that have a quantized layer."""
    return [
        module
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel)
        and any(isinstance(one, QLinear | QEmbedding) for one in module.modules())
    ]
