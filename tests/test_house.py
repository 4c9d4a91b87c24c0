"""The rules of the house: which room imports which, no circles, sizes of files, one place that chooses the device."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyqkern"

# Each room imports those listed before it. A room is a folder of pyqkern/, schemes.py or progress.py.
ROOMS = (
    "schemes", "progress", "backends", "ops", "functional", "nn", "models",
    "calibration", "training", "checkpoints", "hf", "analysis", "bulk", "cli",
)  # fmt: skip

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LONGEST, SHORTEST = 500, 15  # lines of a file; an __init__.py may be shorter

# Questions about the device that choose no kernel: (file, source of the expression) and why it is asked.
ABOUT_DEVICES = {
    ("pyqkern/nn/fused.py", "x.is_cpu"): "the operator of a whole layer is for CPUs; elsewhere its linears run",
    ("pyqkern/nn/fused.py", "parts.linears[0]._buffers['packed'].is_cpu"): "as above",
    ("pyqkern/nn/decoder.py", "mask.is_cpu"): "as above",
    ("pyqkern/nn/kv_cache.py", "tensor.is_cpu"): "as above",
    ("pyqkern/hf/lora.py", "a.device.type"): "autocast is switched off for the device of the weights",
    ("pyqkern/backends/reference/affine.py", "x.is_cpu"): "K calls for one product would keep a GPU waiting",
    ("pyqkern/ops/encoder.py", "tensor.is_cpu"): "the operator of a whole layer refuses what is not on the CPU",
    ("pyqkern/ops/decoder.py", "tensor.is_cpu"): "as above",
    ("pyqkern/ops/decoder.py", "position.is_cpu"): "as above",
    ("pyqkern/ops/layers.py", "mask.is_cpu"): "as above",
    ("pyqkern/ops/affine.py", "tensor.is_cuda"): "values are not checked on a GPU, which would have to wait for them",
    ("pyqkern/ops/checks.py", "ids.is_cuda"): "as above",
    ("pyqkern/ops/four_bit.py", "device.type"): "an error names the device",
    ("pyqkern/ops/recurrent.py", "batch_sizes.is_cpu"): "sizes are read on the CPU, as a PackedSequence has them",
    ("kernels/device.py", "head.device.type"): "a Triton kernel refuses tensors that are not on CUDA",
    ("kernels/device.py", "device.type"): "properties of a CUDA device, and what stands for them in the interpreter",
}


# ---- imports


def room(module: str) -> str:
    """The room of a module; "" for pyqkern/__init__.py."""
    return [*module.split("."), ""][1]


def module_of(name: str) -> str | None:
    """The file that a dotted name is in: "pyqkern.ops.int8.int8_linear" is in pyqkern.ops.int8."""
    parts = name.split(".")
    if parts[:2] in (["pyqkern", "_C"], ["pyqkern", "kernels"]):  # compiled, and beside the rooms
        return None
    return next((module for n in range(len(parts), 0, -1) if (module := ".".join(parts[:n])) in MODULES), None)


def imported(tree: ast.Module) -> set[str]:
    """The modules of pyqkern that a file imports, at the top, in functions and by importlib.import_module("...")."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        found |= {module for name in names if (module := module_of(name))}
    return found


IMPORTS = {module: imported(ast.parse(path.read_text(), str(path))) for module, path in MODULES.items()}


def test_every_room_is_listed_and_has_its_tests() -> None:
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms == set(ROOMS)
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {name for name in rooms if (PACKAGE / name).is_dir()} | {"kernels", "support"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(name) + 1])
    up = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if room(module) == name and room(other) not in allowed
    ]
    assert up == []


def test_no_files_import_each_other() -> None:
    """Neither two nor more, in a circle."""
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# ---- files


def sources(*folders: str) -> Iterator[tuple[str, int]]:
    """Files and how many lines each has."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".inl"):
                yield str(path.relative_to(ROOT)), len(path.read_text().splitlines())


def test_no_file_is_long() -> None:
    folders = ("pyqkern", "kernels", "csrc", "tests", "benchmarks")
    assert [(name, lines) for name, lines in sources(*folders) if lines > LONGEST] == []


def test_no_file_is_too_short_to_be_one() -> None:
    short = [(name, lines) for name, lines in sources("pyqkern") if lines < SHORTEST]
    assert [(name, lines) for name, lines in short if not name.endswith("__init__.py")] == []


# ---- devices


def about_devices(tree: ast.Module) -> Iterator[ast.expr]:
    """Expressions that ask for a tensor's device, or which backend a variable holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_device = ast.unparse(node.value).split(".")[-1] == "device"
            if node.attr in ("is_cuda", "is_cpu") or (node.attr == "type" and of_device):
                yield node
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            sides = {ast.unparse(side) for side in (node.left, *node.comparators)}
            if sides & {"cpu", "cuda", "reference", "'cpu'", "'cuda'"} and not any(s.endswith(".type") for s in sides):
                yield node


def test_only_the_registry_chooses_a_kernel_by_its_device() -> None:
    found = set()
    for folder in ("pyqkern", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            found |= {(name, ast.unparse(node)) for node in about_devices(ast.parse(path.read_text()))}
    found = {(name, text) for name, text in found if name != "pyqkern/ops/registry.py"}
    assert found - set(ABOUT_DEVICES) == set()
    assert set(ABOUT_DEVICES) - found == set(), "these exceptions are not needed any more"
