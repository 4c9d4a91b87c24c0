"""QExperts: the quantized experts of transformers' mixture-of-experts layers."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from tiny import MOE_SCHEMES, moe
from torch import Tensor, nn

from pyqkern import FP4Linear, Int8Linear, QExperts
from pyqkern.nn.experts import WEIGHTS, unsupported
from pyqkern.schemes import NF4, Int8

pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are linears before 5")

TOKENS, HIDDEN, EXPERTS = 9, 64, 6


def floats(implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """The experts of a tiny Mixtral with larger weights."""
    experts = moe().model.layers[0].mlp.experts.to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    experts.config._experts_implementation = implementation
    return experts


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.rand(count, EXPERTS, generator=generator).softmax(-1).topk(2)
    return torch.randn(count, HIDDEN, generator=generator).to(dtype), index, weights


@pytest.mark.parametrize("scheme", MOE_SCHEMES, ids=repr)
def test_close_to_its_dequantized_weights_in_transformers_own_code(scheme: Any, isa: str) -> None:
    experts = QExperts.from_experts(floats(), scheme)
    y, exact = experts(*tokens()), experts.in_float()(*tokens())
    # Codes of activations are within half a step of 1/255 (1/127) of a row's range: 0.05 of the norm leaves room for
    # two layers of it. The weights are the same.
    assert type(experts.in_float()) is type(floats())
    assert (y - exact).norm() <= 0.05 * exact.norm()
    if getattr(experts.scheme, "compute", None) == "fp32":
        assert (y - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_implementation_transformers_was_asked_for(implementation: str) -> None:
    module = floats(implementation)
    assert torch.equal(QExperts.from_experts(module)(*tokens()), QExperts.from_experts(floats())(*tokens()))
    assert (QExperts.from_experts(module)(*tokens()) - module(*tokens())).norm() <= 0.03 * module(*tokens()).norm()


@pytest.mark.parametrize("scheme", MOE_SCHEMES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_floats(scheme: Any, dtype: torch.dtype) -> None:
    module = floats(dtype=dtype)
    experts = QExperts.from_experts(module, scheme)
    x, index, weights = tokens(dtype=dtype)
    y = experts(x, index, weights)
    assert y.dtype is dtype and torch.equal(y, experts(x.float(), index, weights).to(dtype))
    assert experts.in_float().gate_up_proj.dtype is dtype
    assert torch.equal(experts.float()(x, index, weights), y)


@pytest.mark.parametrize("scheme", MOE_SCHEMES, ids=repr)
def test_state_dict_copies_and_pickles_have_the_same_bits(scheme: Any) -> None:
    experts = QExperts.from_experts(floats(), scheme)
    y = experts(*tokens())
    for one in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(one(*tokens()), y)
    state = experts.state_dict()
    assert state["gate_up_proj.weight"].shape[0] in (EXPERTS * 256, EXPERTS * 256 * HIDDEN // 2)
    other = floats()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    empty = QExperts.from_experts(other, scheme)
    assert not torch.equal(empty(*tokens()), y)
    empty.load_state_dict(state)
    assert torch.equal(empty(*tokens()), y)


def test_gradients_reach_the_tokens_and_the_router() -> None:
    experts = QExperts.from_experts(floats())
    exact = experts.in_float()
    results = []
    for module in (experts, exact):
        x, index, weights = tokens()
        x.requires_grad_(), weights.requires_grad_()
        module(x, index, weights).square().sum().backward()
        results.append((x.grad, weights.grad))
    for ours, others in zip(*results, strict=True):
        assert ours is not None and others is not None and (ours - others).norm() <= 0.05 * others.norm()
    x, index, weights = tokens()
    weights.requires_grad_()
    experts(x, index, weights).sum().backward()
    assert weights.grad is not None and x.grad is None


def test_compiled_into_one_graph_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    experts = QExperts.from_experts(floats(), "nf4")
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5, 30):
        with torch.no_grad():
            assert torch.equal(compiled(*tokens(count)), experts(*tokens(count)))
    x, index, weights = tokens()
    x.requires_grad_()
    compiled(x, index, weights).sum().backward()
    expected = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    experts(x, index, weights).sum().backward()
    assert torch.equal(x.grad, expected)


def test_exported() -> None:
    experts = QExperts.from_experts(floats())
    with torch.no_grad():
        exported = torch.export.export(experts, tokens()).module()
        assert torch.equal(exported(*tokens()), experts(*tokens()))


def test_no_tokens_and_autocast() -> None:
    experts = QExperts.from_experts(floats())
    assert experts(*tokens(0)).shape == (0, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts(*tokens()), experts(*tokens()).float())  # as transformers: the dtype of the tokens


def test_what_it_shows() -> None:
    experts = QExperts.from_experts(floats(), FP4Linear(64, 64).scheme)
    assert repr(experts).startswith("QExperts(\n  6x128x64, activation=silu, scheme=fp4\n  (gate_up_proj): FP4Linear(")
    assert experts.scheme.name == "fp4" and experts.dtype is torch.float32 and experts.num_experts == EXPERTS
    assert [name for name, linear in experts.linears()] == list(WEIGHTS)


# ---- what is refused


def test_schemes_and_shapes_that_do_not_fit() -> None:
    for scheme in ("int8-weight-only", "int8-outlier", "int8-static"):
        with pytest.raises(ValueError, match="not to 'int8-"):
            QExperts.from_experts(floats(), scheme)
    with pytest.raises(ValueError, match="blocksize must divide in_features=64, got 128"):
        QExperts.from_experts(floats(), NF4(blocksize=128))
    with pytest.raises(ValueError, match="whole groups of 256 blocks for double_quant, got 64x128"):
        QExperts.from_experts(floats(), NF4(double_quant=True))
    broken = floats()
    broken.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        QExperts.from_experts(broken)


def test_double_quant_where_experts_are_whole_groups() -> None:
    module = moe(hidden_size=128, intermediate_size=256).model.layers[0].mlp.experts
    module.config._experts_implementation = "eager"
    experts = QExperts.from_experts(module, NF4(blocksize=64, double_quant=True))
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.rand(5, EXPERTS, generator=generator).softmax(-1).topk(2)
    x = torch.randn(5, 128, generator=generator)
    exact = experts.in_float()(x, index, weights)
    assert (experts(x, index, weights) - exact).norm() <= 0.05 * exact.norm()


def _patched() -> Any:
    module = floats()
    module.forward = module.forward
    return module


def _declared_otherwise(**declared: bool) -> Any:
    module = floats()
    vars(module).update(declared)
    return module


class Mine(nn.Module):
    """Experts of a user's own, with the names of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.zeros(2, n, k)) for n, k in ((128, 64), (64, 64)))


def _other_activation() -> Any:
    module = floats()
    module.act_fn = nn.Tanh()
    return module


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: nn.Linear(4, 4), "does not keep its weights as gate_up_proj and down_proj"),
        (_patched, "patched"),
        (Mine, "no class that declares how its experts are multiplied"),
        (lambda: _declared_otherwise(is_transposed=True), "is_transposed is True"),
        (lambda: _declared_otherwise(_is_expert_parallel=True), "_is_expert_parallel is True"),
        (_other_activation, "an activation that the kernels have not: Tanh"),
    ],
)
def test_experts_that_are_not_known(made: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        QExperts.from_experts(made(), Int8())


def test_a_class_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = floats()
    assert unsupported(module) is None
    monkeypatch.setattr(type(module), "forward", lambda self, *given: given[0])
    assert "declares" in (unsupported(module) or "")
    assert isinstance(QExperts.from_experts(floats_before(monkeypatch)), QExperts)


def floats_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.undo()
    return floats()


def test_the_linears_are_of_the_scheme() -> None:
    assert all(type(linear) is Int8Linear for _, linear in QExperts.from_experts(floats()).linears())
