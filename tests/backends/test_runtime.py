"""ISAs, threads, fork and the GIL: each in a process of its own where it has to be."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from require import ISAS
from strategies import floats
from torch import nn

import pyqkern
from pyqkern import _C, QLinear


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, for a minute at most."""
    env = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def layer(n: int = 768, k: int = 768) -> QLinear:
    torch.manual_seed(0)
    return QLinear.from_linear(nn.Linear(k, n)).requires_grad_(False)


# ---- ISAs


def test_isas() -> None:
    assert set(pyqkern.isas()) <= set(ISAS) and pyqkern.isas()[-1] == "scalar"
    assert pyqkern.isas() == [name for name in ISAS if name in pyqkern.isas()]


def test_isas_are_what_the_cpu_has() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avxvnni": {"avx_vnni", "avx2"},
        "avx512vnni": {"avx512_vnni", "avx512bw", "avx512vl"},
    }
    assert set(pyqkern.isas()) == {"scalar"} | {name for name, flag in needs.items() if flag <= flags}


def test_the_isa_in_use_can_be_switched(isa: str) -> None:
    assert pyqkern.isa() == isa
    assert _C.set_isa("scalar") == isa and pyqkern.isa() == "scalar"
    assert _C.set_isa(isa) == "scalar"


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_isa_is_refused(name: str) -> None:
    before = pyqkern.isa()
    with pytest.raises(ValueError, match=r"scalar"):
        _C.set_isa(name)
    assert pyqkern.isa() == before


def test_the_environment_chooses_the_isa(isa: str) -> None:
    assert python("import pyqkern; print(pyqkern.isa())", PYQKERN_ISA=isa).stdout.strip() == isa


def test_the_environment_names_an_unknown_isa() -> None:
    result = python("import pyqkern; pyqkern.isa()", PYQKERN_ISA="avx9000")
    assert result.returncode == 1 and "ValueError" in result.stderr
    assert "avx9000" in result.stderr and all(name in result.stderr for name in pyqkern.isas())


def test_the_best_isa_is_the_default() -> None:
    assert python("import pyqkern; print(pyqkern.isa())", PYQKERN_ISA="").stdout.strip() == pyqkern.isas()[0]


# ---- threads


def test_torch_sets_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert _C.threads() == threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", ["torch", "pyqkern"])
def test_one_openmp_runtime_is_mapped_and_one_pool_used(first: str) -> None:
    """Whoever comes first: one libgomp, no libomp or libiomp5, and no thread more than torch's own."""
    result = python(
        f"""import {first}, torch, pyqkern, os
from pyqkern import _C
torch.set_num_threads(2)
a = torch.randn(512, 512); a @ a; torch.nn.functional.relu(torch.randn(10**6))
before = len(os.listdir("/proc/self/task"))
layer = pyqkern.QLinear.from_linear(torch.nn.Linear(512, 512))
with torch.no_grad():
    layer(torch.randn(512, 512))
print(len(os.listdir("/proc/self/task")) - before)
maps = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
names = [os.path.basename(path).split(".")[0].split("-")[0] for path in maps]
print([name for name in names if name in ("libgomp", "libomp", "libiomp5")])
print(_C.openmp() in maps)
"""
    )
    assert result.stdout.split("\n")[:3] == ["0", "['libgomp']", "True"], result.stderr


def test_four_python_threads_may_call_one_module() -> None:
    module = layer()
    inputs = [floats((m, 768), m) for m in (1, 5, 64, 200)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(module(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_gil_is_released() -> None:
    """While one thread is inside a long product, another wakes up again and again; with the GIL held, it could not."""
    a, w = torch.ones(2000, 2000, dtype=torch.int8), torch.ones(2000, 2000, dtype=torch.int8)
    inside, count = threading.Event(), 0

    def work() -> None:
        inside.set()
        pyqkern.int8_matmul(a, w)
        inside.clear()

    previous = _C.set_isa("scalar")
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    while inside.is_set():
        count += 1
        time.sleep(0.001)
    thread.join()
    _C.set_isa(previous)
    assert count >= 10


# ---- fork


# torch's own parallel operators may hang in such a child, so that it uses none: bytes are compared, not tensors.
FORK = """
import os, signal, torch, pyqkern
torch.set_num_threads(2)
torch.manual_seed(0)
layer = pyqkern.QLinear.from_linear(torch.nn.Linear(512, 512)).requires_grad_(False)
x, wide, scale = torch.randn(512, 512), torch.randn(3000, 1000), torch.tensor(0.1)
def results():
    return layer(x).numpy().tobytes(), pyqkern.quantize_affine(wide, scale).numpy().tobytes()
before = results()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if results() == before else 1)
_, status = os.waitpid(child, 0)
assert results() == before
print(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_works_after_the_pool_was_used(isa: str) -> None:
    result = python(FORK, PYQKERN_ISA=isa)
    assert result.stdout.strip() == "0", result.stderr


def test_a_data_loader_worker_works() -> None:
    """multiprocessing with fork, as a DataLoader does it."""
    result = python(
        """
import multiprocessing, torch, pyqkern
layer = pyqkern.QLinear.from_linear(torch.nn.Linear(512, 512)).requires_grad_(False)
x = torch.randn(256, 512)
def work(_):
    return layer(x).numpy().tobytes()
expected = work(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(work, range(4)).get(30) == [expected] * 4)
"""
    )
    assert result.stdout.strip() == "True", result.stderr


# ---- calls that take long, and what they leave behind

LONG = {
    "int8_matmul": """
codes = torch.ones(20_000, 20_000, dtype=torch.int8); call = lambda: pyqkern.int8_matmul(codes, codes)""",
    "the linear": """
layer = pyqkern.QLinear.from_linear(torch.nn.Linear(8192, 8192)).requires_grad_(False)
x = torch.randn(100_000, 8192, dtype=torch.bfloat16); call = lambda: layer(x)""",
    "the input of a recurrent layer": """
layer = pyqkern.QRecurrent.from_recurrent(torch.nn.LSTM(4096, 256)).requires_grad_(False)
x = torch.randn(3000, 16, 4096); call = lambda: layer(x)""",
    "the steps of a recurrent layer": """
layer = pyqkern.QRecurrent.from_recurrent(torch.nn.LSTM(1, 1024)).requires_grad_(False)
x = torch.randn(3000, 64, 1); call = lambda: layer(x)""",
    "the steps of one sequence": """
layer = pyqkern.QRecurrent.from_recurrent(torch.nn.GRU(1, 2048), "nf4").requires_grad_(False)
x = torch.randn(30_000, 1, 1); call = lambda: layer(x)""",
    "attention": """
sys.path.insert(0, TESTS + "/support")
from encoder_layer import Layer
layer = Layer(); x = torch.randn(1, 60_000, 48); call = lambda: layer(x)""",
    "attention over a cache": """
sys.path.insert(0, TESTS + "/support")
from decoder_layers import Layer
layer = Layer(); x, caches = layer.input(1, 60_000), layer.cache(1, 60_000); call = lambda: layer(x, *caches)""",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", LONG)
def test_control_c_ends_a_long_call(what: str, threads: int) -> None:
    """The scalar kernels: each of these calls takes a minute with them."""
    code = f"""
import os, signal, sys, threading, time, torch, pyqkern
TESTS = {str(Path(__file__).parent.parent)!r}
torch.set_num_threads({threads})
{LONG[what]}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with SIGINT ignored
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    call()
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 20)
x = torch.ones(2, 2, dtype=torch.int8)
assert pyqkern.int8_matmul(x, x).tolist() == [[2, 2], [2, 2]], "the next call"
"""
    assert python(code, PYQKERN_ISA="scalar").stdout.strip() == "interrupted True"


def test_the_number_of_threads_holds_in_every_python_thread() -> None:
    """OpenMP keeps it for each thread, and torch has not run in this one."""
    result = python(
        """import threading, torch, pyqkern
from pyqkern import _C
torch.set_num_threads(2)
told, tasks = [], lambda: len(__import__("os").listdir("/proc/self/task"))
a = torch.ones(512, 512, dtype=torch.int8)
y = torch.empty(512, 512, dtype=torch.int32)
def work():
    before = tasks()
    _C.int8_matmul(a, a, y)
    told.extend([tasks() - before, _C.threads()])
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(told)
""",
        OMP_NUM_THREADS="5",
    )
    assert result.stdout.strip() == "[1, 2]", result.stderr


BIG = {
    "int8_matmul": "a, w = ones(16, 20_000), ones(20_000, 20_000); call = lambda: pyqkern.int8_matmul(a, w)",
    "the INT8 linear": "layer, x = linear(64, 16, 'int8'), torch.randn(2_000_000, 64); call = lambda: layer(x)",
    "the 4-bit linear": "layer, x = linear(64, 16, 'nf4'), torch.randn(4_000_000, 64); call = lambda: layer(x)",
    "the flat 4-bit linear": """
layer, x = linear(72, 3, "nf4"), torch.ones(1_000_000, 72).half(); call = lambda: layer(x)""",
    "double quantization": """
n = 2**28
packed, absmax = torch.zeros(n // 2, dtype=torch.uint8), torch.zeros(n // 32, dtype=torch.uint8)
scales = torch.ones(n // 32 // 256), torch.ones(256), torch.tensor(0.0)
call = lambda: torch.ops.pyqkern.dequantize_4bit(packed, absmax, *scales, "nf4", 32, [n], torch.bfloat16)""",
}


@pytest.mark.parametrize("what", BIG)
def test_a_large_call_leaves_no_memory_behind(what: str) -> None:
    """Scratch of 32 MB and more, by the resident memory after the call: 4 MiB a buffer may stay."""
    code = f"""
import torch, pyqkern
torch.set_num_threads(2)
ones = lambda *shape: torch.ones(shape, dtype=torch.int8)
linear = lambda k, n, scheme: pyqkern.QLinear.from_linear(torch.nn.Linear(k, n), scheme).requires_grad_(False)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
{BIG[what]}
small = linear(64, 16, "int8"); small(torch.randn(4, 64))
before = resident()
y = call()
del y
print(resident() - before)
"""
    result = python(code)
    assert int(result.stdout) < 20, result.stdout + result.stderr
