"""torch.compile and torch.export of quantized models: one graph, for any batch and length, in any process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SCHEMES, bert, output
from torch import Tensor, nn

from pyqkern import calibrate, replace_embedding, replace_linear
from pyqkern.schemes import Int8Static

SIZES = ((2, 12), (3, 17), (5, 9), (8, 33))
NAMED = [*SCHEMES, "int8-static"]


class Tagger(nn.Module):
    """The kinds of layer that there are, small: a graph of it takes a second, one of a BERT ten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(100, 64)
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64), nn.Linear(64, 2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids))


def quantized(scheme: object, model: nn.Module) -> nn.Module:
    model.eval()
    if scheme == "int8-static":
        return replace_linear(model, Int8Static(calibrate(model, [torch.arange(24).view(2, 12)])))
    embeddings = "nf4" if scheme == "nf4" else "int8"
    return replace_linear(replace_embedding(model, embeddings), scheme)  # type: ignore[arg-type]


def random_ids(size: tuple[int, int]) -> Tensor:
    return torch.randint(100, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", NAMED, ids=repr)
def test_one_graph_for_all_sizes(scheme: object) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = quantized(scheme, Tagger())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in SIZES:
            a, b = compiled(random_ids(size)), model(random_ids(size))
            assert (a - b).norm() <= 0.01 * b.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_bert_without_being_told_that_sizes_vary() -> None:
    """By inductor. The second size makes the graph dynamic; after that nothing is compiled again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = quantized("nf4", bert(num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True)
    for size in SIZES:
        a, b = output(compiled, random_ids(size)), output(model, random_ids(size))
        # Inductor's GELU, softmax and LayerNorm differ in the last bits, which can move a code by one step.
        assert (a - b).norm() <= 0.01 * b.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Encoder(nn.Module):
    """The hidden states of a BERT as a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = bert(num_hidden_layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


LOAD = """
import sys
import pyqkern, torch
for name in sys.argv[2:]:
    program = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()
    ids = torch.load(f"{sys.argv[1]}/inputs.pt")
    torch.save(program(ids), f"{sys.argv[1]}/{name}.pt")
assert "transformers" not in sys.modules
"""


def test_exported_programs_run_where_only_pyqkern_is_imported(tmp_path: Path) -> None:
    """Exported from one size, dynamic in both dimensions, run with another: every scheme, and a BERT."""
    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    torch.save(random_ids((5, 17)), tmp_path / "inputs.pt")
    models = [quantized(scheme, Tagger()) for scheme in NAMED] + [quantized("nf4", Encoder())]
    expected = {}
    with torch.no_grad():
        for i, model in enumerate(models):
            program = torch.export.export(model, (random_ids((2, 12)),), dynamic_shapes={"ids": dims})
            torch.export.save(program, tmp_path / f"{i}.pt2")
            expected[str(i)] = model(random_ids((5, 17)))
    command = [sys.executable, "-c", LOAD, str(tmp_path), *expected]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    for name, y in expected.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert (found - y).norm() <= 0.01 * y.norm()
