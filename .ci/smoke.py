"""An installed pyqkern works, outside of its repository: called by .ci/wheel and by cibuildwheel."""

import copy
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pyqkern.kernels
import torch

import pyqkern
from pyqkern import _C

version = importlib.metadata.version("pyqkern")
assert pyqkern.__version__ == version, (pyqkern.__version__, version)
assert "site-packages" in Path(pyqkern.__file__).parts and "site-packages" in Path(pyqkern.kernels.__file__).parts
assert (Path(pyqkern.__file__).parent / "py.typed").exists()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 10)).eval()
x = torch.randn(33, 256)
with torch.inference_mode():
    expected = model(x)
    for scheme, error in (("int8", 0.02), ("nf4", 0.2), ("int8-weight-only", 0.02)):
        quantized = pyqkern.replace_linear(copy.deepcopy(model), scheme)
        results = {}
        for isa in pyqkern.isas():
            _C.set_isa(isa)
            results[isa] = quantized(x)
        y = results["scalar"]
        assert float((y - expected).norm() / expected.norm()) < error, scheme
        assert all(torch.equal(other, y) for other in results.values()), scheme
        print(f"{scheme}: the same on {', '.join(results)}")

for isa in pyqkern.isas():  # as a user forces it
    command = [sys.executable, "-c", "import pyqkern; print(pyqkern.isa())"]
    said = subprocess.run(command, env={**os.environ, "PYQKERN_ISA": isa}, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == isa, said
