"""Training with twins: schedules, learned ranges, resuming, transformers' Trainer, DDP, distillation, ReLU for GELU."""

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import pyqkern
from pyqkern.training import Schedule, convert, distillation_loss, freeze_ranges, prepare

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 4


def fresh(scheme: str = "int8-static") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    ranges = pyqkern.calibrate(model, [X], progress=False) if scheme == "int8-static" else None
    return prepare(model, scheme, ranges=ranges, learn_ranges=ranges is not None)


def run(model: nn.Module, optimizer: Any, schedule: Schedule, steps: range) -> list[float]:
    losses = []
    for step in steps:
        rows = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:8]
        loss = nn.functional.cross_entropy(model(X[rows]), LABELS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "int4"])
def test_a_training_that_is_killed_resumes_with_the_same_losses(scheme: str) -> None:
    """The kill comes before quantizing has begun; learned ranges, the schedule and the optimizer come back."""

    def start() -> tuple[Any, Any, Schedule]:
        model = fresh(scheme)
        schedule = Schedule(model, start=6, freeze=10 if scheme == "int8-static" else None)
        return model, pyqkern.optim.AdamW8bit(model.parameters(), lr=1e-2), schedule

    parts = start()
    whole = run(*parts, range(14))
    killed = start()
    assert run(*killed, range(8)) == whole[:8]
    file = io.BytesIO()
    torch.save([part.state_dict() for part in killed], file)
    file.seek(0)
    resumed = start()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert run(*resumed, range(8, 14)) == whole[8:]
    assert len(set(whole)) == 14 and torch.equal(convert(resumed[0])(X), convert(parts[0])(X))


def test_a_schedule_quantizes_after_some_steps_and_freezes_ranges() -> None:
    model = fresh()
    in_float = copy.deepcopy(model)
    for twin in (in_float[0], in_float[2]):
        twin.quantizing = False
    schedule = Schedule(model, start=2, freeze=4)
    assert torch.equal(model(X), in_float(X))
    learned = []
    for _ in range(6):
        learned.append((model[0].quantizing, model[0].input_scale.requires_grad))
        model(X).sum().backward()
        schedule.step()
    assert learned == [(False, True)] * 2 + [(True, True)] * 2 + [(True, False)] * 2
    assert model[0].input_scale.grad is None and model[0].weight.grad is not None
    schedule.step(3)  # as a callback that resumes says it
    assert model[0].quantizing and model[0].input_scale.requires_grad
    assert schedule.state_dict() == {"steps": 3}
    with pytest.raises(ValueError, match="steps must not be negative"):
        schedule.step(-1)
    with pytest.warns(UserWarning, match="freeze has no effect: no ranges are learned"):
        Schedule(fresh("int8"), freeze=3)


def test_ranges_are_frozen() -> None:
    model = fresh()
    model(X).sum().backward()
    assert model[2].input_scale.grad is not None
    freeze_ranges(model)
    assert model[2].input_scale.grad is None and not model[2].input_scale.requires_grad
    model(X).sum().backward()
    assert model[2].input_scale.grad is None


def test_in_float_learned_ranges_get_a_gradient_of_zero() -> None:
    """So that every process of DDP has one for every parameter that is trained."""
    model = fresh()
    Schedule(model, start=5)
    model(X).sum().backward()
    assert model[0].input_scale.grad.item() == 0 and model[0].input_offset.grad.item() == 0


def test_quantization_aware_training_wins_back_what_4_bits_lose() -> None:
    """A float model is trained, loses much in FP4 with one scale for all, and gets most of it back."""
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    target = torch.randn(64, 4)
    labels = ((x @ target).tanh() + 0.1 * torch.randn(512, 4)).argmax(1)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    scheme = pyqkern.FP4(blocksize=4096)

    def train(model: nn.Module, steps: int, lr: float) -> None:
        optimizer = pyqkern.optim.Adam8bit(model.parameters(), lr=lr)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), labels).item()

    train(model, 100, 1e-2)
    with torch.no_grad():
        model[0].weight[0] *= 8  # an outlier, so that the rest has few codes
        model[2].weight[:, 0] /= 8
        model[0].bias[0] *= 8
    in_float, after = loss_of(model), loss_of(pyqkern.replace_linear(copy.deepcopy(model), scheme))
    trained = prepare(copy.deepcopy(model), scheme)
    train(trained, 60, 3e-3)
    won = loss_of(convert(trained))
    assert after > in_float + 0.02 and won < in_float + 0.2 * (after - in_float)


# ---- around


def test_the_trainer(tmp_path: Any) -> None:
    """transformers': a schedule by a callback, a checkpoint, and going on from it with the same weights and ranges."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    config = BertConfig(**(tiny.BERT | {"num_hidden_layers": 1}))
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.tensor(i % 2)} for i in range(16)]

    def train(steps: int, resume: bool) -> Any:
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        ranges = pyqkern.calibrate(model, [{"input_ids": torch.arange(16).view(2, 8)}], progress=False)
        prepare(model, "int8-static", ranges=ranges, learn_ranges=True)
        schedule = Schedule(model, start=1)

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                schedule.step(state.global_step)

            on_step_end = on_train_begin

        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, learning_rate=1e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Callback()])
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.steps == steps
        return model

    train(2, resume=False)
    resumed, whole = train(4, resume=True), train(4, resume=False)
    one, other = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "classifier.input_scale" in one
    folder = tmp_path / "converted"
    convert(resumed).save_pretrained(folder)
    loaded = BertForSequenceClassification.from_pretrained(folder)
    ids = torch.arange(16).view(2, 8)
    assert torch.equal(loaded.eval()(ids).logits, resumed.eval()(ids).logits)


DDP = """
import os, sys
import torch, pyqkern
from torch import nn
from pyqkern.training import prepare

torch.set_num_threads(1)
rank, world = int(sys.argv[1]), int(sys.argv[2])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])
torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
x, y = torch.randn(8, 64), torch.randn(8, 4)
ranges = pyqkern.calibrate(model, [x], progress=False)
prepare(model, "int8-static", ranges=ranges, learn_ranges=True)
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
part = slice(rank * 8 // world, (rank + 1) * 8 // world)
for _ in range(3):
    loss = (ddp(x[part]) - y[part]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    torch.save(model.state_dict(), sys.argv[4])
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_ddp(tmp_path: Path) -> None:
    """Two processes with half of a batch each come to what one comes to, within the rounding of sums."""
    states = []
    for world in (1, 2):
        file, port = tmp_path / f"{world}.pt", str(29600 + world + torch.randint(300, ()).item() * 2)
        command = [sys.executable, "-c", DDP]
        processes = [subprocess.Popen([*command, str(rank), str(world), port, str(file)]) for rank in range(world)]
        assert [process.wait(timeout=240) for process in processes] == [0] * world
        states.append(torch.load(file, weights_only=True))
    assert "0.input_scale" in states[0]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


def test_distillation_adds_what_it_says() -> None:
    torch.manual_seed(0)
    model = tiny.bert("BertForSequenceClassification", num_labels=3)
    teacher = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": tiny.IDS, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    how = {"teacher": teacher, "temperature": 3.0, "weight": 0.25}
    loss, outputs = distillation_loss(model, inputs, **how, hidden_weight=0.5, return_outputs=True)
    assert not teacher.training
    with torch.no_grad():
        expected = teacher(tiny.IDS, attention_mask=mask, output_hidden_states=True)
        logits = model(tiny.IDS, attention_mask=mask).logits
    p, q = (x / 3 for x in (expected.logits, logits))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean() * 9
    parts = [
        ((a - b).square().mean(-1) * mask).sum() / mask.sum()
        for a, b in zip(outputs.hidden_states, expected.hidden_states, strict=True)
    ]
    total = 0.25 * kl + 0.75 * nn.functional.cross_entropy(logits, inputs["labels"]) + 0.5 * torch.stack(parts).mean()
    assert torch.allclose(loss, total, rtol=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with pytest.raises(ValueError, match="logits of model and teacher must have one shape"):
        distillation_loss(model, inputs, teacher=tiny.bert("BertForSequenceClassification", num_labels=5))


def test_distillation_of_the_model_itself_is_zero() -> None:
    model = tiny.bert("BertForSequenceClassification")
    loss = distillation_loss(model, {"input_ids": tiny.IDS}, teacher=copy.deepcopy(model), weight=1.0)
    assert abs(loss.item()) < 1e-6


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(64, 64), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))  # type: ignore[no-any-return]


def test_relu_takes_the_place_of_gelu(tmp_path: Path) -> None:
    own = prepare(Gelu(), relu=True)
    assert type(own.act) is nn.ReLU and (own(X) >= 0).all()  # type: ignore[operator]
    model = prepare(tiny.bert("BertForSequenceClassification"), relu=True)
    assert model.config.hidden_act == "relu"
    assert type(model.bert.encoder.layer[1].intermediate.intermediate_act_fn) is nn.ReLU
    convert(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny.IDS).logits, model(tiny.IDS).logits)
    layer = prepare(nn.TransformerEncoderLayer(64, 4, 128, activation="gelu"), relu=True)
    assert layer.activation is nn.functional.relu
