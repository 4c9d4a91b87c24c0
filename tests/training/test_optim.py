"""pyqkern.optim against torch.optim, and as users use it: groups, schedules, closures, scalers, bad input, resuming."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, seeds, strided
from torch import Tensor, nn

import pyqkern
from pyqkern.training.optim import Adam8bit, AdamW8bit, Lion8bit, Optimizer8bit, SGD8bit, param_groups

EPS = 2.0**-24
ALL = [AdamW8bit, Adam8bit, SGD8bit, Lion8bit]
N = 5000  # more than min_8bit_size, and no multiple of 256


def parameters(seed: int = 0, sizes: tuple[tuple[int, ...], ...] = ((50, 100), (7,))) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=g)) for size in sizes]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    states = [value for p in params for _, value in sorted(optimizer.state[p].items()) if isinstance(value, Tensor)]
    return [t.detach().clone() for t in (*params, *states)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- against torch


class Lion(torch.optim.Optimizer):
    """The paper's algorithm 2 in fp64, which torch does not have."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (m * b1 + (1 - b1) * p.grad).sign()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
                m.mul_(b2).add_((1 - b2) * p.grad)


PAIRS: list[tuple[type[Optimizer8bit], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (AdamW8bit, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    (AdamW8bit, torch.optim.AdamW, {"lr": torch.tensor(1e-2), "maximize": True}),
    (Adam8bit, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}),
    (Adam8bit, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.7, "dampening": 0.3, "maximize": True}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    (Lion8bit, Lion, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
]


@pytest.mark.parametrize("options", [{}, {"bits": 32, "min_8bit_size": 0}], ids=["small", "bits=32"])
@pytest.mark.parametrize("kind, reference, arguments", PAIRS)
def test_fp32_moments_are_torchs(
    isa: str, kind: type[Optimizer8bit], reference: Callable[..., torch.optim.Optimizer], arguments: dict[str, Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """In ten steps; torch's optimizer in fp64."""
    sizes = ((50, 100), (7,)) if options else ((50, 70), (7,))
    ours = parameters(0, sizes)
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    a, b = kind(ours, **arguments, **options), reference(theirs, **arguments)
    for step in range(10):
        set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        a.step()
        b.step()
    assert all(a.state[p]["state1"].dtype is torch.float32 for p in ours)
    lr = float(arguments["lr"])
    for p, q in zip(ours, theirs, strict=True):
        # Each step rounds p once, and moves it by lr times a number u of at most some ten, in which six roundings, and
        # those of the moments before, are each EPS of |u|; |u| <= 10 for all of these.
        assert ((p.double() - q).abs() <= 10 * EPS * (q.abs() + 0.5) + 10 * lr * 10 * 30 * EPS).all()


@settings(max_examples=25)
@given(
    n=st.integers(1, 9000), seed=seeds, pair=st.sampled_from(PAIRS), dtype=st.sampled_from(FLOATS),
    strides=st.sampled_from(["contiguous", "transposed", "every second"]),
)  # fmt: skip
def test_a_first_step_is_torchs(n: int, seed: int, pair: Any, dtype: torch.dtype, strides: str) -> None:
    """The first step reads no codes, so that it is exact with 8 bits too; of every dtype and stride."""
    kind, reference, arguments = pair
    g = torch.Generator().manual_seed(seed)
    value = strided(torch.randn(3, -(-n // 3), generator=g).to(dtype), strides)
    grad = torch.randn(value.shape, generator=g).to(dtype)
    p, q = nn.Parameter(value), nn.Parameter(value.detach().double())
    assert p.stride() == value.stride()
    p.grad, q.grad = grad, grad.double()
    kind([p], **arguments).step()
    reference([q], **arguments).step()
    rounding = torch.finfo(dtype).eps / 2 if dtype is not torch.float32 else 2 * EPS
    moved = 10 * float(arguments["lr"])
    assert ((p.double() - q).abs() <= rounding * (q.abs() + moved) + moved * 20 * EPS + torch.finfo(dtype).tiny).all()
    assert p.stride() == value.stride()


@pytest.mark.parametrize("kind, lr", [(AdamW8bit, 3e-2), (Adam8bit, 3e-2), (SGD8bit, 3e-2), (Lion8bit, 3e-3)])
def test_a_model_is_trained(isa: str, kind: type[Optimizer8bit], lr: float) -> None:
    """As far as with moments in fp32."""
    losses = {}
    for bits in (8, 32):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        target = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        optimizer = kind(model.parameters(), lr=lr, bits=bits)
        for _ in range(200):
            x = torch.randn(64, 64)
            loss = (model(x) - target(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[bits] = float(loss.detach())
    assert losses[8] < 0.5 * float(target(torch.randn(64, 64)).square().mean())
    assert losses[8] < 1.1 * losses[32]


# ---- the state's size


def test_two_bytes_an_element() -> None:
    p = nn.Parameter(torch.randn(1000, 1000))
    p.grad = torch.randn(1000, 1000)
    optimizer = AdamW8bit([p])
    optimizer.step()
    state = [t for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    assert sum(t.numel() * t.element_size() for t in state) / p.numel() <= 2.05


# ---- groups and options


def test_groups_have_options_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.LayerNorm(100))
    model[2].weight.requires_grad_(False)
    groups = param_groups(model, {nn.Embedding: {"bits": 32}, "*.bias": {"weight_decay": 0.0, "lr": 0.0}})
    assert [len(group["params"]) for group in groups] == [1, 1, 2]
    optimizer = AdamW8bit(groups, lr=1e-2, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False, False]  # frozen, and biases with lr = 0
    assert optimizer.state[model[0].weight]["state1"].dtype is torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype is torch.uint8
    assert model[2].weight not in optimizer.state
    with pytest.raises(ValueError, match="options must have keys that fit a trained parameter, got 'x'"):
        param_groups(model, {"x": {}})
    with pytest.raises(TypeError, match="options must have patterns or types"):
        param_groups(model, {3: {}})  # type: ignore[dict-item]


def test_a_group_that_comes_later() -> None:
    params = parameters()
    optimizer = SGD8bit(params[:1])
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": params[1:], "momentum": 0.5, "min_8bit_size": 1})
    train(optimizer, params, range(2, 4))
    assert [optimizer.state[p]["step"] for p in params] == [4, 2]
    assert optimizer.state[params[1]]["state1"].dtype is torch.uint8
    for wrong in ({"momentum": 1.5}, {"bits": 7}, {"min_8bit_size": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            optimizer.add_param_group({"params": parameters(1), **wrong})
    with pytest.raises(TypeError, match="params must be float32, bfloat16 or float16, got float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3).double())]})
    assert len(optimizer.param_groups) == 2


def test_named_parameters() -> None:
    model = nn.Linear(64, 64)
    optimizer = AdamW8bit(model.named_parameters())
    model.weight.grad = torch.full((64, 64), math.nan)
    with pytest.raises(ValueError, match=r"those of weight of group 0, \(64, 64\) are not"):
        optimizer.step()


@pytest.mark.parametrize("kind", ALL)
def test_schedulers_and_closures(kind: type[Optimizer8bit]) -> None:
    model = nn.Linear(70, 70)
    lr = 0.1 if kind is SGD8bit else 1e-3
    optimizer = kind(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 70)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(5):
        schedule.step()
        last = optimizer.step(closure)
    assert last < first
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    optimizer.step(closure)
    assert same(before, [p.detach() for p in model.parameters()])


def test_in_place_changes_are_seen_by_autograd() -> None:
    p = nn.Parameter(torch.ones(N))
    loss = (p * p).sum()
    p.grad = torch.ones(N)
    AdamW8bit([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- scaled and clipped gradients


@pytest.mark.parametrize("kind", ALL)
def test_clipping_is_that_of_torch(kind: type[Optimizer8bit]) -> None:
    """Within the rounding of the factor and of g times it: the gradients' norm is taken in another order."""
    ours, theirs = parameters(), parameters()
    a, b = kind(ours, lr=1e-2, max_grad_norm=3.0, bits=32), kind(theirs, lr=1e-2, bits=32)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        grads = [p.grad.clone() for p in ours]
        nn.utils.clip_grad_norm_(theirs, 3.0)
        a.step()
        b.step()
        assert same(grads, [p.grad for p in ours])  # which are left as they are
    for p, q in zip(ours, theirs, strict=True):
        # Adam's and Lion's moves do not depend on the scale but for rounding; SGD's are lr * 3 at most.
        assert ((p - q).abs() <= 3 * (2 * EPS * p.abs() + 1e-2 * 2.0**-16)).all()
    free = kind(parameters(), lr=1e-2, max_grad_norm=1e9)
    assert free.param_groups[0]["max_grad_norm"] == 1e9
    with pytest.raises(ValueError, match="max_grad_norm must be the same for all groups"):
        groups = [{"params": ours[:1]}, {"params": ours[1:], "max_grad_norm": 2.0}]
        set_grads(ours, 0)
        kind(groups, max_grad_norm=1.0).step()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler(unscale: bool) -> None:
    """The step divides by the scale, a power of two, exactly; a step with an infinite gradient is left out."""
    ours, theirs = parameters(), parameters()
    a, b = AdamW8bit(ours), AdamW8bit(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        set_grads(ours, step, scale=2.0 ** (10 if step < 3 else 9))
        scaler.scale(torch.ones(()))
        if step == 2:
            ours[0].grad[3, 4] = math.inf
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if step != 2:
            set_grads(theirs, step)
            b.step()
    assert scaler.get_scale() == 2.0**9
    assert same(snapshot(a, ours), snapshot(b, theirs))


# ---- bad input


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**59])
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_that_are_not_finite_change_nothing(kind: type[Optimizer8bit], bad: float, which: int) -> None:
    params = parameters()
    optimizer = kind(params)
    for fresh in (True, False):
        if not fresh:
            train(optimizer, params, range(2))
        set_grads(params, 9)
        params[which].grad.view(-1)[-1] = bad
        before, steps = snapshot(optimizer, params), [optimizer.state[p].get("step") for p in params]
        with pytest.raises(ValueError, match=rf"gradients must be finite .* parameter {which} of group 0"):
            optimizer.step()
        assert same(before, snapshot(optimizer, params))
        assert steps == [optimizer.state[p].get("step") for p in params]
    set_grads(params, 9)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_parameter_that_decays_into_the_gradient_is_finite() -> None:
    params = parameters()
    params[0].data[0, 0] = math.nan
    for kind in (Adam8bit, SGD8bit):
        optimizer = kind(params, weight_decay=0.1)
        set_grads(params, 0)
        with pytest.raises(ValueError, match="parameters that decay must be finite"):
            optimizer.step()
        assert not any(optimizer.state[p] for p in params)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(100, 64, sparse=True)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    optimizer = Adam8bit([other, table.weight])
    with pytest.raises(TypeError, match="gradients must be dense, got a sparse one for parameter 1 of group 0"):
        optimizer.step()
    assert torch.equal(other.detach(), torch.ones(3)) and not optimizer.state[other]


def test_a_parameter_of_another_shape_than_its_state() -> None:
    p = nn.Parameter(torch.ones(80, 64))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = torch.ones(64, 64)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"state1 must be of shape \(64, 64\), got \(80, 64\)"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(64, 64))


def test_parameters_without_elements_and_without_gradients() -> None:
    empty, unused, scalar = (
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.ones(5)),
        nn.Parameter(torch.tensor(1.0)),
    )
    empty.grad, scalar.grad = torch.empty(0, 3), torch.tensor(2.0)
    optimizer = Lion8bit([empty, unused, scalar], lr=0.25)
    optimizer.step()
    assert scalar.item() == 0.75 and torch.equal(unused.detach(), torch.ones(5))
    AdamW8bit([unused]).step()


def test_gradients_of_another_dtype() -> None:
    """They are widened, whatever the parameter is."""
    p, q = nn.Parameter(torch.ones(N).bfloat16()), nn.Parameter(torch.ones(N).bfloat16())
    grad = torch.randn(N, generator=torch.Generator().manual_seed(0)).half()
    args = ("adam", [1.0, 0, 1, 0.9, 0.1, 0.999, 0.001, 1.0, 1e-8, -0.1])
    for parameter, g in ((p, grad), (q, grad.float())):
        states = [[torch.zeros(N)], [torch.zeros(N)], [], []]
        torch.ops.pyqkern.optimizer_step(*args, [parameter.detach()], [g], *states)
    assert torch.equal(p, q) and not torch.equal(p.detach(), torch.ones(N).bfloat16())


# ---- saved and resumed


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
def test_a_training_that_is_resumed_goes_on_as_if_nothing_was(kind: type[Optimizer8bit], how: str) -> None:
    params = parameters()
    optimizer = kind(params, lr=3e-2, max_grad_norm=50.0, weight_decay=0.1)
    train(optimizer, params, range(3))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save({"state": optimizer.state_dict(), "params": params}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        others = list(saved["params"])
        resumed = kind(others, lr=1.0)
        resumed.load_state_dict(saved["state"])
    else:
        pair = (optimizer, params)
        if how == "deepcopy":
            resumed, others = copy.deepcopy(pair)
        else:
            file = io.BytesIO()
            torch.save(pair, file)
            file.seek(0)
            resumed, others = torch.load(file, weights_only=False)
    train(resumed, others, range(3, 6))
    train(optimizer, params, range(3, 6))
    assert same(snapshot(optimizer, params), snapshot(resumed, others))
    assert resumed.param_groups[0]["max_grad_norm"] == 50.0


def test_a_killed_training_has_the_same_losses() -> None:
    def run(model: nn.Module, optimizer: Optimizer8bit, steps: range) -> list[float]:
        losses = []
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def fresh() -> tuple[nn.Module, Optimizer8bit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 64))
        return model, AdamW8bit(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    whole = run(model, optimizer, range(12))
    model, optimizer = fresh()
    run(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, optimizer = fresh()
    for target, saved in zip((model, optimizer), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(saved)
    assert run(model, optimizer, range(5, 12)) == whole[5:]


def test_a_state_dict_is_a_copy() -> None:
    """Two optimizers that share a state would both change it."""
    params, others = parameters(), parameters()
    a, b = AdamW8bit(params), AdamW8bit(others)
    train(a, params, range(2))
    b.load_state_dict(a.state_dict())
    before = snapshot(b, others)
    train(a, params, range(2, 3))
    assert same(before, snapshot(b, others))


def test_the_trainer(tmp_path: Any) -> None:
    """transformers': a step, a checkpoint, and going on from it."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.tensor(i % 2)} for i in range(16)]

    def run(steps: int, resume: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        optimizer = AdamW8bit(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, save_total_limit=1 if resume else None,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        assert any("absmax1" in state for state in optimizer.state.values())
        return {name: t.clone() for name, t in model.state_dict().items()}

    run(2, resume=False)
    resumed, whole = run(4, resume=True), run(4, resume=False)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_public_name() -> None:
    import pyqkern.optim as by_name

    assert by_name.AdamW8bit is pyqkern.optim.AdamW8bit is AdamW8bit
