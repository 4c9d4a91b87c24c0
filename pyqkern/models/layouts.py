"""Where each family of encoders keeps the parts of a layer: the only such table.

`optimize` fuses layers of the classes in LAYOUTS, which are told by module and name, so that transformers need not be
imported and no class of a user's own is taken for one of them. `smooth` asks for the parts alone (`find_parts`): what
it does is right for every layer that has them.
"""

import sys
from collections.abc import Iterator

from torch import nn

from pyqkern.nn.encoder import Layout, Path, part_of


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) for name in names)


_BERT = Layout(
    ("attention", "self"),
    _paths(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    _paths("attention.output.LayerNorm", "output.LayerNorm"),
    ("intermediate", "intermediate_act_fn"),
    "num_attention_heads",
)

_DISTILBERT = Layout(
    ("attention",),
    _paths("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    _paths("sa_layer_norm", "output_layer_norm"),
    ("ffn", "activation"),
    "n_heads",
)

_ALBERT = Layout(
    ("attention",),
    _paths("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
    _paths("attention.LayerNorm", "full_layer_layer_norm"),
    ("activation",),
    "num_attention_heads",
)

_MPNET = Layout(
    ("attention", "attn"),
    _paths(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    _paths("attention.LayerNorm", "output.LayerNorm"),
    ("intermediate", "intermediate_act_fn"),
    "num_attention_heads",
    position_bias="position_bias",
    returns_tuple=True,
)

# By the module of transformers.models and the name of the class in it.
LAYOUTS = {
    "bert.modeling_bert.BertLayer": _BERT,
    "roberta.modeling_roberta.RobertaLayer": _BERT,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "camembert.modeling_camembert.CamembertLayer": _BERT,
    "electra.modeling_electra.ElectraLayer": _BERT,
    "ernie.modeling_ernie.ErnieLayer": _BERT,
    "data2vec.modeling_data2vec_text.Data2VecTextLayer": _BERT,
    "distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
    "albert.modeling_albert.AlbertLayer": _ALBERT,
    "mpnet.modeling_mpnet.MPNetLayer": _MPNET,
}
_LAYOUTS = list(dict.fromkeys(LAYOUTS.values()))
_PACKAGE = "transformers.models."


def is_of_transformers(kind: type) -> bool:
    """Whether the class is the very one that transformers has under its name, and not a user's of that name."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("transformers.") and getattr(module, kind.__name__, None) is kind


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer whose class is in the table."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__name__}"
    return LAYOUTS.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) and is_of_transformers(kind) else None


def resembles_one(layer: nn.Module) -> bool:
    """Whether the layer's class, or one that it derives from, has the name of a class in the table."""
    names = {name.rpartition(".")[2] for name in LAYOUTS}
    return any(kind.__name__ in names for kind in type(layer).__mro__)


def find_parts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Every module in which a layout's linears and norms are found, whatever its class: its name and the layout."""
    for name, module in model.named_modules():
        for layout in _LAYOUTS:
            if _has_parts(module, layout):
                yield name, layout


def _has_parts(module: nn.Module, layout: Layout) -> bool:
    try:
        return all(isinstance(part_of(module, path), nn.Module) for path in (*layout.linears, *layout.norms))
    except AttributeError:
        return False
