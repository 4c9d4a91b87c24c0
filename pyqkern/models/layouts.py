"""Where each family of encoders keeps the parts of a layer."""

from pyqkern.nn.encoder import Layout, Path


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


# By the name of the class, so that transformers need not be imported.
LAYOUTS = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "ErnieLayer": _BERT,
    "Data2VecTextLayer": _BERT,
    "TransformerBlock": _DISTILBERT,
    "AlbertLayer": _ALBERT,
    "MPNetLayer": _MPNET,
}
