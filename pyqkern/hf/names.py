"""The names of tensors in a model and in its files, which transformers makes different for many families.

ViT's query is `layers.0.attention.q_proj.weight` in the model and `encoder.layer.0.attention.attention.query.weight` in
the file; three float weights of NomicBert are one tensor in the file. A folder of pyqkern has the file's names in the
files and in config.json: they stay what they are when the code of a family is written anew.
"""

from collections.abc import Iterable
from typing import Any

import transformers

from pyqkern.hf import transformers4

V4 = int(transformers.__version__.split(".")[0]) < 5


def in_model(model: Any, keys: Iterable[str], names: Iterable[str] | None = None) -> dict[str, str]:
    """Key in the file -> key in the model, as from_pretrained finds it. names: the model's keys.

    Left out is what the model does not have, and what is several of the model's tensors, joined.
    """
    expected = dict.fromkeys(model.state_dict() if names is None else names, True)
    if V4:
        return transformers4.in_model(model, keys, expected)
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings, converters = _sorted_out(get_model_conversion_mapping(model))
    found: dict[str, str] = {}
    for key in sorted(keys, key=loading.dot_natural_key):
        name, joined = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, joined = key, None
        if joined is None and name in expected:
            found[key] = name
    return found


def in_files(model: Any, modules: dict[str, list[str]], names: Iterable[str], own: bool = False) -> dict[str, str]:
    """What the files call the layers `names`, of which `modules` are those that are quantized.

    modules: name -> names of its tensors, "weight_scale" for example. transformers is kept from joining them with
    others. own: the names of the model, with which save_original_format=False leaves them. Raises ValueError where it
    would write names under which from_pretrained does not find them again.
    """
    keys = {f"{name}.{tensor}": name for name, tensors in modules.items() for tensor in tensors}
    wanted = [*keys, *(f"{name}.weight" for name in names)]
    if own:
        found = {key: key for key in wanted}
        lost = _lost(model, keys, found)
    elif V4:
        found = transformers4.in_files(model, wanted)
        lost = _lost(model, keys, found)
    else:
        conversions = _conversions(model)
        for chosen in (_without_joining(conversions, list(keys)), []):
            model._weight_conversions = chosen
            found = _names_in_files(chosen, wanted)
            if not (lost := _lost(model, keys, found)):
                break
    if lost:
        raise ValueError(
            f"{lost[0]} of this model would be saved as {found[lost[0]]}, and from_pretrained would not find it; leave "
            "the layer in float with exclude=, or save the state_dict yourself"
        )
    return {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in found.items()}


def _lost(model: Any, keys: dict[str, str], found: dict[str, str]) -> list[str]:
    """Those keys of quantized layers that are not found again, or not under the name of their layer."""
    in_files, back = [found[key] for key in keys], in_model(model, found.values(), [*model.state_dict(), *keys])
    lost = []
    for key, module in keys.items():
        layer = found[f"{module.removesuffix('.table')}.weight"].removesuffix("weight")
        name = found[key]
        expected = layer + ("table." if module.endswith(".table") else "") + key.removeprefix(f"{module}.")
        if name != expected or in_files.count(name) > 1 or back.get(name) != key:
            lost.append(key)
    return lost


def _conversions(model: Any) -> list[Any]:
    """What save_pretrained is to undo, as transformers decides it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    own = getattr(model, "_weight_conversions", None)
    if own is not None:
        return list(own)
    return [one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)]


def _without_joining(conversions: list[Any], keys: list[str]) -> list[Any]:
    """The conversions less those that would make one tensor of several, or change one, where they meet a key."""
    _, converters = _sorted_out(conversions)
    joining = [one for one in converters if any(one.reverse_transform().rename_source_key(key)[1] for key in keys)]
    return [one for one in conversions if not any(one is other for other in joining)]


def _names_in_files(conversions: list[Any], keys: list[str]) -> dict[str, str]:
    from transformers import core_model_loading as loading

    renamings, _ = _sorted_out([one.reverse_transform() for one in reversed(conversions)])
    return {key: loading.apply_renamings(key, renamings) for key in sorted(keys, key=loading.dot_natural_key)}


def _sorted_out(conversions: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those that rename, and those that change tensors."""
    from transformers.core_model_loading import WeightConverter

    renamings = [one for one in conversions if not isinstance(one, WeightConverter)]
    return renamings, [one for one in conversions if isinstance(one, WeightConverter)]
