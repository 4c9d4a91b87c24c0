"""Where each family of encoders keeps the parts of a layer: the only such table.

`optimize` fuses layers of the classes in LAYOUTS, which are told by module and name, so that transformers need not be
imported and no class of a user's own is taken for one of them. `smooth` asks for the parts alone (`find_layouts`): what
it does is right for every layer that has them.
"""

from collections.abc import Iterator

from torch import nn

from pyqkern.nn.encoder_parts import Layout, Path, is_of_transformers, part_of


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) for name in names)


def _containers(**kinds: str) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """attention__self="A B": the part attention.self is of class A or, in another version of transformers, B."""
    return tuple((tuple(path.split("__")), tuple(names.split())) for path, names in kinds.items())


def _bert(family: str) -> Layout:
    return Layout(
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
        _containers(
            attention=f"{family}Attention",
            attention__self=f"{family}SelfAttention {family}SdpaSelfAttention",
            attention__output=f"{family}SelfOutput",
            intermediate=f"{family}Intermediate",
            output=f"{family}Output",
        ),
    )


_DISTILBERT = Layout(
    ("attention",),
    _paths("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    _paths("sa_layer_norm", "output_layer_norm"),
    ("ffn", "activation"),
    "n_heads",
    _containers(attention="DistilBertSelfAttention DistilBertSdpaAttention MultiHeadSelfAttention", ffn="FFN"),
)

_ALBERT = Layout(
    ("attention",),
    _paths("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
    _paths("attention.LayerNorm", "full_layer_layer_norm"),
    ("activation",),
    "num_attention_heads",
    _containers(attention="AlbertAttention AlbertSdpaAttention"),
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
    _containers(
        attention="MPNetAttention",
        attention__attn="MPNetSelfAttention",
        intermediate="MPNetIntermediate",
        output="MPNetOutput",
    ),
    position_bias="position_bias",
    returns_tuple=True,
)

# By the module of transformers.models and the name of the class in it.
LAYOUTS = {
    "bert.modeling_bert.BertLayer": _bert("Bert"),
    "roberta.modeling_roberta.RobertaLayer": _bert("Roberta"),
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _bert("XLMRoberta"),
    "camembert.modeling_camembert.CamembertLayer": _bert("Camembert"),
    "electra.modeling_electra.ElectraLayer": _bert("Electra"),
    "ernie.modeling_ernie.ErnieLayer": _bert("Ernie"),
    "data2vec.modeling_data2vec_text.Data2VecTextLayer": _bert("Data2VecText"),
    "distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
    "albert.modeling_albert.AlbertLayer": _ALBERT,
    "mpnet.modeling_mpnet.MPNetLayer": _MPNET,
}
_BY_LINEARS = {layout.linears: layout for layout in LAYOUTS.values()}
_PACKAGE = "transformers.models."


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer whose class is in the table."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__name__}"
    return LAYOUTS.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) and is_of_transformers(kind) else None


def resembles_one(layer: nn.Module) -> bool:
    """Whether the layer's class, or one that it derives from, has the name of a class in the table."""
    names = {name.rpartition(".")[2] for name in LAYOUTS}
    return any(kind.__name__ in names for kind in type(layer).__mro__)


def find_layouts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Every module in which a layout's linears and norms are found, whatever its class: its name and the layout."""
    for name, module in model.named_modules():
        for layout in _BY_LINEARS.values():
            if _has_parts(module, layout):
                yield name, layout


def _has_parts(module: nn.Module, layout: Layout) -> bool:
    try:
        return all(isinstance(part_of(module, path), nn.Module) for path in (*layout.linears, *layout.norms))
    except AttributeError:
        return False
