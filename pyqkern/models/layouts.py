"""Where each family of models keeps the parts of an encoder or decoder layer: the only such table.

`optimize` fuses layers of the classes in LAYOUTS, which are told by module and name, so that transformers need not be
imported and no class of a user's own is taken for one of them. `smooth` asks for the parts alone (`find_layouts`): what
it does is right for every layer that has them.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from pyqkern.nn.decoder_parts import DecoderLayout
from pyqkern.nn.encoder_parts import EncoderLayout
from pyqkern.nn.fused_parts import Layout, Path, is_of_transformers, part_of


def _paths(*names: str) -> tuple[Path, ...]:
    return tuple(tuple(name.split(".")) for name in names)


def _containers(**kinds: str) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """attention__self="A B": the part attention.self is of class A or, in another version of transformers, B."""
    return tuple((tuple(path.split("__")), tuple(names.split())) for path, names in kinds.items())


def _bert(family: str) -> EncoderLayout:
    return EncoderLayout(
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


_DISTILBERT = EncoderLayout(
    ("attention",),
    _paths("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    _paths("sa_layer_norm", "output_layer_norm"),
    ("ffn", "activation"),
    "n_heads",
    _containers(attention="DistilBertSelfAttention DistilBertSdpaAttention MultiHeadSelfAttention", ffn="FFN"),
)

_ALBERT = EncoderLayout(
    ("attention",),
    _paths("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
    _paths("attention.LayerNorm", "full_layer_layer_norm"),
    ("activation",),
    "num_attention_heads",
    _containers(attention="AlbertAttention AlbertSdpaAttention"),
)

_MPNET = EncoderLayout(
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


def _llama(family: str, *constants: tuple[Path, object, str]) -> DecoderLayout:
    return DecoderLayout(
        ("self_attn",),
        _paths(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ),
        _paths("input_layernorm", "post_attention_layernorm"),
        ("mlp", "act_fn"),
        "",
        _containers(self_attn=f"{family}Attention", mlp=f"{family}MLP"),
        returns_tuple=False,
        norm=f"{family}RMSNorm",
        gated=True,
        rotary=True,
        constants=(_CAUSAL, *constants),
    )


_CAUSAL = (("self_attn", "is_causal"), True, "its attention looks ahead")

_QWEN3 = replace(_llama("Qwen3"), head_norms=_paths("self_attn.q_norm", "self_attn.k_norm"))

_PHI3 = replace(
    _llama("Phi3"),
    linears=_paths("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    activation=("mlp", "activation_fn"),
    heads="num_key_value_heads",
)

_GPT2 = DecoderLayout(
    ("attn",),
    _paths("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    _paths("ln_1", "ln_2"),
    ("mlp", "act"),
    "num_heads",
    _containers(attn="GPT2Attention", mlp="GPT2MLP"),
    constants=(
        (("attn", "is_causal"), True, "its attention looks ahead"),
        (("attn", "is_cross_attention"), False, "its attention is to another sequence"),
    ),
)

_OPT = DecoderLayout(
    ("self_attn",),
    _paths("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    _paths("self_attn_layer_norm", "final_layer_norm"),
    ("activation_fn",),
    "num_heads",
    _containers(self_attn="OPTAttention"),
    constants=(_CAUSAL, (("do_layer_norm_before",), True, "its norms come behind attention and feed-forward")),
)

_BLOOM = DecoderLayout(
    ("self_attention",),
    _paths("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    _paths("input_layernorm", "post_attention_layernorm"),
    ("mlp", "gelu_impl"),
    "num_heads",
    _containers(self_attention="BloomAttention", mlp="BloomMLP"),
    cache="layer_past",
    alibi="alibi",
    scaling="inv_norm_factor",
    interleaved=True,
    returns_weights=True,
    constants=(
        (("apply_residual_connection_post_layernorm",), False, "its residuals come from behind the norms"),
        (("self_attention", "beta"), 1.0, "its ALiBi is scaled"),
        (("self_attention", "slow_but_exact"), False, "its output is summed in slices"),
        (("mlp", "slow_but_exact"), False, "its output is summed in slices"),
    ),
)

# By the module of transformers.models and the name of the class in it.
LAYOUTS: dict[str, Layout] = {
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
    "llama.modeling_llama.LlamaDecoderLayer": _llama("Llama"),
    "mistral.modeling_mistral.MistralDecoderLayer": _llama("Mistral"),
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": _llama("Qwen2"),
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": _QWEN3,
    "phi3.modeling_phi3.Phi3DecoderLayer": _PHI3,
    "gemma.modeling_gemma.GemmaDecoderLayer": replace(_llama("Gemma"), norm_offset=1.0),
    "gpt2.modeling_gpt2.GPT2Block": _GPT2,
    "opt.modeling_opt.OPTDecoderLayer": _OPT,
    "bloom.modeling_bloom.BloomBlock": _BLOOM,
}
_BY_LINEARS = {layout.linears: layout for layout in LAYOUTS.values() if isinstance(layout, EncoderLayout)}
_PACKAGE = "transformers.models."


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer whose class is in the table."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__name__}"
    return LAYOUTS.get(name.removeprefix(_PACKAGE)) if name.startswith(_PACKAGE) and is_of_transformers(kind) else None


def resembled_layout(layer: nn.Module) -> Layout | None:
    """The layout of the class in the table whose name the layer's class has, or one that it derives from."""
    names = {name.rpartition(".")[2]: layout for name, layout in LAYOUTS.items()}
    return next((names[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in names), None)


def find_layouts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Every module with the linears and norms of an encoder layout, whatever its class: its name and the layout."""
    for name, module in model.named_modules():
        for layout in _BY_LINEARS.values():
            if _has_parts(module, layout):
                yield name, layout


def _has_parts(module: nn.Module, layout: Layout) -> bool:
    try:
        return all(isinstance(part_of(module, path), nn.Module) for path in (*layout.linears, *layout.norms))
    except AttributeError:
        return False
