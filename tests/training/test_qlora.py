"""LoRA and DoRA of peft on quantized layers, against peft on the same model with dequantized weights."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as FloatLora
from tiny import IDS, bert, gpt2, output
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyqkern
from pyqkern import QLinear, optimize, replace_linear
from pyqkern.hf.lora import LoraQLinear
from pyqkern.hf.model import dequantize
from pyqkern.nn.linear import PIECE
from pyqkern.schemes import NF4, Int4, Scheme
from pyqkern.training import prepare_for_training

LABELS = torch.tensor([0, 1])
TARGETS = ["query", "value", "intermediate.dense"]
SCHEMES: list[str | Scheme] = ["nf4", NF4(double_quant=True), Int4(group_size=32), "int8", "int8-weight-only"]
EXACT: list[str | Scheme] = [NF4(compute="fp32"), Int4(group_size=32, compute="fp32"), "int8-weight-only"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def quantized(scheme: str | Scheme = "nf4", **options: Any) -> Any:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | options
    return replace_linear(bert("BertForSequenceClassification", **options), scheme, exclude=["classifier", "*pooler*"])


def dequantized(model: Any) -> Any:
    """A copy in float of the quantized values."""
    copied = copy.deepcopy(model)
    dequantize(copied)
    assert not any(isinstance(module, QLinear) for module in copied.modules())
    return copied


def adapted(model: Any, requantize: bool | None = False, seed: int = 1, **options: Any) -> Any:
    """With adapters that do something. requantize=None: by peft alone."""
    torch.manual_seed(seed)
    config = LoraConfig(**({"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options))
    model = get_peft_model(model, config if requantize is None else pyqkern.lora(config, requantize=requantize))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # they start at the norms, where DoRA changes nothing
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    return model.eval()


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(IDS, labels=LABELS).loss
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: Tensor, b: Tensor, bound: float = 2.0**-14) -> bool:
    """Within `bound` of the largest, by default 2^10 times 2^-24: sums of hundreds of products, each rounded by 2^-24,
    in another order, through two encoder layers."""
    return bool((a - b).abs().max() <= bound * b.abs().max())


# ---- gradients


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("scheme", EXACT, ids=str)
def test_gradients_are_those_of_the_dequantized_model(scheme: str | Scheme, use_dora: bool) -> None:
    model = quantized(scheme)
    ours = adapted(model, use_dora=use_dora)
    theirs = adapted(dequantized(quantized(scheme)), None, use_dora=use_dora)
    assert close(output(ours), output(theirs))
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys() and any("layer.0" in name for name in a)
    assert sum("magnitude" in name for name in a) == (6 if use_dora else 0)
    assert all(close(a[name], b[name]) for name in a)


@each_scheme
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layers_gradients_are_those_of_the_dequantized_one(scheme: str | Scheme, dropout: float) -> None:
    """Also where activations are quantized: they count as they are. For the same gradient of the output."""
    torch.manual_seed(0)
    base = QLinear.from_linear(nn.Linear(128, 96), scheme)
    plain = nn.Linear(128, 96)
    plain.weight, plain.bias = nn.Parameter(base.weight.clone()), base.bias
    options = {"target_modules": ["0"], "lora_dropout": dropout, "bias": "all"}
    ours, theirs = adapted(nn.Sequential(base), **options), adapted(nn.Sequential(plain), None, **options)
    grad, found = torch.randn(20, 96), []
    for model in (ours.train(), theirs.train()):
        x = torch.randn(20, 128, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(3)  # dropout
        model(x).backward(grad)
        found.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 4
    # Each is a sum of at most 128 products, and one of 4 beside it: 2^-24 of the sum of magnitudes each.
    assert all(close(found[0][name], found[1][name], 132 * 2.0**-24 * 8) for name in found[0])


def test_checkpointing_and_autocast_change_no_gradient() -> None:
    a, b = adapted(quantized()), adapted(prepare_for_training(quantized()))
    assert b.base_model.model.is_gradient_checkpointing
    found, again = gradients(a.train()), gradients(b.train())
    assert all(torch.equal(found[name], again[name]) for name in found)
    with torch.autocast("cpu", torch.bfloat16):
        model = adapted(quantized())
        rough = gradients(model)  # backward under autocast too
    assert all(value.dtype is torch.float32 for value in rough.values())
    assert all(close(rough[name], found[name], 0.2) for name in found)  # bf16 has eight bits


class Largest(TorchDispatchMode):
    """Notes how many elements the largest float tensor had that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        for one in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(one, Tensor) and one.is_floating_point():
                self.elements = max(self.elements, one.numel())
        return results


@each_scheme
@pytest.mark.parametrize("use_dora", [False, True])
def test_no_dense_copy_of_a_weight_is_made(scheme: str | Scheme, use_dora: bool) -> None:
    layer = QLinear.from_linear(nn.Linear(2048, 1024), scheme)
    model = adapted(nn.Sequential(layer), target_modules=["0"], use_dora=use_dora, lora_dropout=0.1).train()
    with Largest() as largest:
        model(torch.randn(2, 2048, requires_grad=True)).sum().backward()
    assert layer.in_features * layer.out_features > PIECE
    assert largest.elements <= (PIECE if use_dora else 4 * 2048)  # without: the gradient of A


# ---- training


@each_scheme
def test_a_few_steps_lower_the_loss(scheme: str | Scheme) -> None:
    model = adapted(prepare_for_training(quantized(scheme), gradient_checkpointing=False), init_lora_weights=True)
    codes = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(15):
        loss = loss_of(model.train())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(losses) < 0.85 * losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in codes.items())


def train(folder: Path, steps: int, resume: bool = False) -> list[float]:
    model = adapted(prepare_for_training(quantized(hidden_dropout_prob=0.1)), init_lora_weights=True)
    rows = [{"input_ids": row, "labels": LABELS[i % 2]} for i, row in enumerate(IDS.repeat(4, 1))]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, learning_rate=0.01, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_training_that_is_resumed_has_the_same_losses(tmp_path: Path) -> None:
    straight = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    assert train(tmp_path / "b", 4, resume=True) == straight and len(straight) == 4


# ---- files


def test_plain_peft_reads_the_adapters(tmp_path: Path) -> None:
    for use_dora in (False, True):
        folder = tmp_path / str(use_dora)
        ours = adapted(quantized(EXACT[0]), use_dora=use_dora)
        ours.save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert "pyqkern" not in (folder / "adapter_config.json").read_text()
        plain = PeftModel.from_pretrained(dequantized(quantized(EXACT[0])), folder).eval()
        assert any(type(module) is FloatLora for module in plain.modules())
        assert close(output(plain), output(ours))
        plain.save_pretrained(tmp_path / "back")
        config = pyqkern.lora(LoraConfig.from_pretrained(tmp_path / "back"))
        again = PeftModel.from_pretrained(quantized(EXACT[0]), tmp_path / "back", config=config).eval()
        assert torch.equal(output(again), output(ours))


def test_pickle_deepcopy_and_state_dict(tmp_path: Path) -> None:
    model = adapted(quantized(), use_dora=True)
    y = output(model)
    model.merge_adapter()
    merged = output(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.base_model.model.bert.encoder.layer[0]))):
        layer = next(module for module in copied.modules() if isinstance(module, LoraQLinear))
        assert layer.merged and type(layer.base_layer) is nn.Linear and isinstance(layer.quantized, QLinear)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied), merged)
    copied.unmerge_adapter()
    assert torch.equal(output(copied), y) and torch.equal(output(model), merged)
    torch.save(copied.state_dict(), tmp_path / "state")
    other = adapted(quantized(), seed=5, use_dora=True)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(output(other), y)


# ---- merging


@pytest.mark.parametrize("use_dora", [False, True])
@each_scheme
def test_merged_layers_are_peft_s_of_the_dequantized_model(scheme: str | Scheme, use_dora: bool) -> None:
    model = adapted(quantized(scheme), use_dora=use_dora)
    y = output(model)
    model.merge_adapter(safe_merge=True)
    merged = output(model)
    model.unmerge_adapter()
    assert torch.equal(output(model), y)
    plain = adapted(dequantized(quantized(scheme)), None, use_dora=use_dora).merge_and_unload()
    result = model.merge_and_unload()
    assert torch.equal(output(result), merged)
    for name in ("attention.self.query", "attention.self.value", "intermediate.dense"):
        for layer, other in zip(result.bert.encoder.layer, plain.bert.encoder.layer, strict=True):
            a, b = layer.get_submodule(name), other.get_submodule(name)
            assert type(a) is nn.Linear and not a.weight.requires_grad
            assert close(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    assert type(result.bert.encoder.layer[0].output.dense) is type(quantized(scheme).bert.encoder.layer[0].output.dense)


@each_scheme
def test_merged_layers_are_quantized_again_when_asked(scheme: str | Scheme) -> None:
    model = adapted(quantized(scheme), requantize=True)
    plain = adapted(dequantized(quantized(scheme)), None).merge_and_unload()
    result = model.merge_and_unload()
    layer, other = (one.bert.encoder.layer[1].attention.self.value for one in (result, plain))
    expected = QLinear.from_linear(other, scheme)
    assert type(layer) is type(expected) and layer.scheme == expected.scheme
    # One code more or less where the sum of base and adapter was rounded otherwise: a quarter of absmax at most.
    assert ((layer.weight - expected.weight).abs() > 1e-6).float().mean() < 0.01
    assert pyqkern.summary(result).bytes_after == pyqkern.summary(quantized(scheme)).bytes_after


def test_a_merged_model_is_saved_and_read_back(tmp_path: Path) -> None:
    for requantize, include in ((False, TARGETS), (True, TARGETS)):
        model = adapted(quantized(), requantize, target_modules=include).merge_and_unload()
        model.save_pretrained(tmp_path / str(requantize))
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / str(requantize)).eval()
        assert torch.equal(output(again), output(model))


def test_several_adapters_and_batches_of_them() -> None:
    model = adapted(quantized(EXACT[0]))
    first = output(model)
    torch.manual_seed(7)
    config = pyqkern.lora(LoraConfig(r=2, target_modules=["query", "output.dense"], init_lora_weights=False))
    model.add_adapter("other", config)
    assert torch.equal(output(model), first)
    with model.disable_adapter():
        base = output(model)
    model.set_adapter("other")
    other = output(model.eval())
    assert not close(other, first, 1e-3) and not close(base, first, 1e-3)
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "other"]).logits
    assert close(mixed[0], first[0]) and close(mixed[1], other[1])
    model.set_adapter("default")
    both = copy.deepcopy(model)
    model.base_model.merge_adapter(["default"])
    assert close(output(model), first)
    both.base_model.merge_adapter(["default", "other"])
    model.base_model.merge_adapter(["other"])  # on top
    assert close(output(both), output(model))
    model.unmerge_adapter()
    assert torch.equal(output(model), first)
    model.delete_adapter("other")
    assert torch.equal(output(model), first)
    with model.disable_adapter():
        assert torch.equal(output(model), base)


def test_smoothed_layers_have_their_factor_in_the_merged_weight() -> None:
    model = bert("BertForSequenceClassification", hidden_dropout_prob=0.0)
    ranges = pyqkern.calibrate(model, [{"input_ids": IDS}], per_channel=True)
    pyqkern.smooth(model, ranges)
    replace_linear(model, "int8-weight-only", exclude=["classifier", "*pooler*"])
    for options in ({}, {"use_dora": True}):
        one = adapted(copy.deepcopy(model), **options)
        y = output(one)
        one.merge_adapter()
        assert close(output(one), y, 2.0**-12)
        plain = adapted(copy.deepcopy(model), requantize=True, **options)
        plain.merge_adapter()
        assert close(output(plain), y, 0.05)


def test_bias_rslora_patterns_and_whole_modules() -> None:
    options: dict[str, Any] = {
        "use_rslora": True, "bias": "lora_only", "lora_bias": True, "rank_pattern": {"value": 2},
        "modules_to_save": ["classifier"], "target_modules": r".*layer\.1.*(query|value)",
    }  # fmt: skip
    ours, theirs = adapted(quantized(EXACT[0]), **options), adapted(dequantized(quantized(EXACT[0])), None, **options)
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys() and any("base_layer.bias" in name for name in a)
    assert all(close(a[name], b[name]) for name in a)
    assert close(output(ours.merge_and_unload()), output(theirs.merge_and_unload()))


def test_a_hook_on_the_base_stays() -> None:
    model = quantized()
    seen: list[int] = []
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: seen.append(1))
    model = adapted(model)
    output(model)
    output(model.merge_and_unload())
    assert len(seen) == 2


def test_conv1d_of_gpt2() -> None:
    """Its weight is transposed; that of the QLinear is not, whatever fan_in_fan_out says."""
    model = replace_linear(gpt2(), "int8-weight-only", include=["*c_attn"])
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    one, plain = adapted(copy.deepcopy(model), **options), adapted(gpt2(), None, **options)
    for name, parameter in one.named_parameters():
        if "lora" in name:
            assert parameter.shape == plain.get_parameter(name).shape
    y = output(one)
    one.merge_adapter()
    assert close(output(one), y)


# ---- what is refused


def test_a_broken_adapter_is_not_merged() -> None:
    model = adapted(quantized())
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    base, before = layer.base_layer, output(model)
    weight = layer.lora_A["default"].weight
    values = weight.detach().clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match="merged weights must be finite, got NaN or an infinity from adapter 'default'"
    ):
        layer.merge(safe_merge=True)
    assert layer.base_layer is base and not layer.merged
    layer.requantize = True
    with pytest.raises(ValueError, match="weight must be finite"):
        layer.merge()
    assert layer.base_layer is base and not layer.merged
    weight.data.copy_(values)
    assert torch.equal(output(model), before)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_starts_that_change_the_base_are_refused(start: str) -> None:
    config = LoraConfig(r=4, target_modules=["query"])
    config.init_lora_weights = start  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"init_lora_weights must be one of .*got '{start}'"):
        pyqkern.lora(config)
    assert not config._custom_modules


def test_a_model_without_a_parameter_is_refused() -> None:
    model = replace_linear(nn.Sequential(nn.Linear(64, 64, bias=False)))
    with pytest.raises(ValueError, match="model must have a parameter"):
        get_peft_model(model, pyqkern.lora(LoraConfig(target_modules=["0"])))
    assert isinstance(model[0], QLinear)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_other_starts_work(start: Any) -> None:
    model = adapted(quantized(), init_lora_weights=start, target_modules=["query"])
    assert torch.equal(output(model), output(quantized())) and gradients(model)


def fused() -> Any:
    return optimize(bert("BertForSequenceClassification"), "nf4", exclude=["classifier"])


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no module": (lambda: 3, {}, TypeError, "model must be an nn.Module"),
    "float": (bert, {}, ValueError, "model must have quantized layers, got none"),
    "fused": (fused, {}, ValueError, "model must not be fused by pyqkern.optimize"),
    "adapters": (lambda: adapted(quantized()), {}, ValueError, "model must not have adapters yet"),
    "checkpointing": (
        lambda: replace_linear(nn.Sequential(nn.Linear(64, 64))), {}, ValueError, "gradient checkpointing",
    ),
    "kwargs": (quantized, {"gradient_checkpointing_kwargs": 3}, TypeError, "gradient_checkpointing_kwargs must be"),
    "no bool": (quantized, {"gradient_checkpointing": 1}, TypeError, "gradient_checkpointing must be a bool"),
}  # fmt: skip


@pytest.mark.parametrize("make, options, error, says", WRONG.values(), ids=WRONG)
def test_what_cannot_be_prepared_is_left_as_it_was(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model = make()
    before = [p.requires_grad for p in model.parameters()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=says):
        prepare_for_training(model, **options)
    assert before == ([p.requires_grad for p in model.parameters()] if before else [])


# ---- prepare_for_training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_compute_in_fp32_and_nothing_else_changes(dtype: torch.dtype) -> None:
    model = replace_linear(bert("BertForSequenceClassification").to(dtype), "nf4", exclude=["classifier"])
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    prepared = prepare_for_training(model)
    changed = {name for name, value in prepared.state_dict().items() if value.dtype is not dtypes[name]}
    assert changed == {name for name in dtypes if "LayerNorm" in name}
    assert not any(p.requires_grad for p in prepared.parameters())
    assert output(prepared).dtype is dtype
    norm = prepared.bert.embeddings.LayerNorm
    x = torch.randn(3, 64).to(dtype)
    exact = nn.functional.layer_norm(x.float(), (64,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), exact.to(dtype))
    assert pickle.loads(pickle.dumps(norm))(x).dtype is dtype
    trained = gradients(adapted(prepared).train())
    assert trained and all(value.isfinite().all() for value in trained.values())


def test_an_optimized_model_with_adapters_goes_layer_by_layer() -> None:
    """Its layers are no one operator any more where an adapter is inside, and give what replace_linear gives."""
    model = fused()
    plain = replace_linear(bert("BertForSequenceClassification"), "nf4", exclude=["classifier"])
    ours, other = adapted(model), adapted(plain)
    assert torch.equal(output(ours), output(other))
    assert "exchanged" in str(model.bert.encoder.layer[0].last_call) or model.bert.encoder.layer[0].last_call
    a, b = gradients(ours.train().eval()), gradients(other)
    assert all(torch.equal(a[name], b[name]) for name in b)
