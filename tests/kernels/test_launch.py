"""What stands around the Triton kernels: which tensors and devices are refused, and the choice of configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from require import available, require
from torch import nn

import pyqkern

if available("triton"):
    from pyqkern.kernels import affine, device, fake_quantize, four_bit, int8, optimizer, row_quantize, tuning
    from pyqkern.kernels.tuning import Config

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def triton() -> None:
    require("triton", "launchers and configurations are not checked")


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The CPU under an H100's name; the file of tuned configurations, not there yet."""
    monkeypatch.setenv("PYQKERN_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(device, "capability", lambda _: 90)
    monkeypatch.setattr(device, "processors", lambda _: 132)
    tuning.choose.cache_clear()
    yield tmp_path / "tuned.json"
    tuning.choose.cache_clear()


# ---- the tests of the numbers, without a GPU


@pytest.mark.parametrize(
    "file", ["test_numerics.py", "test_four_bit.py", "test_fake_quantize.py", "test_optimizer.py", "test_cuda.py"]
)
def test_under_the_interpreter(file: str, tmp_path: Path) -> None:
    """Every kernel of the modules that the file tests runs there; one that no test runs is a failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    ran = tmp_path / "ran.json"
    environment |= {"TRITON_INTERPRET": "1", "PYQKERN_RAN": str(ran), "CUDA_VISIBLE_DEVICES": "", "PYQKERN_REQUIRE": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name(file)))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # test_cuda.py goes through the operators, which do not call every kernel.
    tested = {
        "test_numerics.py": (affine, int8, row_quantize),
        "test_four_bit.py": (four_bit,),
        "test_fake_quantize.py": (fake_quantize,),
        "test_optimizer.py": (optimizer,),
    }.get(file, ())
    kernels = {name for module in tested for name in vars(module) if name.endswith("_kernel")}
    assert kernels - set(json.loads(ran.read_text())) == set()


# ---- what is refused


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be on a CUDA device, got cpu; move it with"):
        row_quantize.quantize_rows(torch.zeros(2, 3), False)
    with pytest.raises(ValueError, match=r"a must be on a CUDA device"):
        int8.int8_matmul(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 3, dtype=torch.int8))


def test_two_devices_are_refused() -> None:
    message = r"all tensors must be on one device, got x on meta and scale on cpu; move them with"
    with pytest.raises(ValueError, match=message):
        affine.quantize(torch.zeros(1, 1, 3, device=META), torch.ones(1), None, torch.int8, True)


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "capability", lambda _: 75)
    monkeypatch.setattr(device, "INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(
        RuntimeError, match=r"need compute capability 8.0 or newer, got 7.5 \(Tesla T4\); keep the model"
    ):
        row_quantize.quantize_rows(torch.zeros(2, 3), False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_type": "nf5"}, "quant_type must be one of nf4, fp4, int4, got 'nf5'"),
        ({"blocksize": 48}, "blocksize must be 32, 64, 128, .*, got 48"),
        ({"packed": torch.zeros(31, dtype=torch.uint8)}, "packed must be 32 of uint8, got 31"),
        ({"packed": torch.zeros(32)}, "packed must be 32 of uint8, got 32 of torch.float32"),
        ({"absmax": torch.zeros(2)}, "absmax must have 1 elements, got 2"),
        ({"absmax": torch.zeros(1, device=META)}, "all tensors must be on one device"),
    ],
)
def test_wrong_4bit_data_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str) -> None:
    monkeypatch.setattr(device, "INTERPRETED", True)
    monkeypatch.setattr(device, "capability", lambda _: 90)
    nested = dict.fromkeys(("nested_absmax", "nested_map", "offset"))
    weight = {"packed": torch.zeros(32, dtype=torch.uint8), "absmax": torch.zeros(1), **nested}
    arguments = weight | {"quant_type": "nf4", "blocksize": 64} | change
    with pytest.raises(ValueError, match=message):
        four_bit.dequantize_4bit(**arguments, shape=(2, 32), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        four_bit.linear_4bit(torch.zeros(1, 32), n=2, bias=None, compute="auto", **arguments)


def test_operands_start_at_a_multiple_of_16_bytes() -> None:
    """The compiler is told so by their address, and the tensor memory accelerator takes no other."""
    buffer = torch.arange(200, dtype=torch.int8)
    for t in (buffer[:160].view(10, 16), buffer[1:161].view(10, 16), buffer[:130].view(10, 13)):
        aligned = int8._aligned(t)
        assert aligned.data_ptr() % 16 == 0 and aligned.stride() == (16, 1)
        assert torch.equal(aligned[:, : t.shape[1]], t) and (aligned[:, t.shape[1] :] == 0).all()
    assert int8._aligned(buffer[:160].view(10, 16)).data_ptr() == buffer.data_ptr()
    assert four_bit._words(buffer[1:161].view(torch.uint8)).data_ptr() % 16 == 0


def test_int4_is_quantized_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, got 'int4'"):
        four_bit.quantize_4bit(torch.zeros(64), "int4", 64)


def test_an_unknown_approximation_is_refused() -> None:
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        row_quantize.gelu_quantize_rows(torch.zeros(2, 3), False, "erf")


# ---- configurations


def test_the_tile_that_fills_the_device_best(h100: Path) -> None:
    """As an H200 measured them, which has as many multiprocessors."""

    def tile(kernel: str, m: int, n: int, k: int) -> tuple[int, ...]:
        config = tuning.choose(kernel, CPU, m, n, k)
        return config.block_m, config.block_n, config.block_k

    assert tile("int8_matmul", 4096, 4096, 4096) == (128, 128, 128)
    assert tile("int8_matmul", 16384, 768, 3072) == tile("int8_matmul", 16384, 3072, 768) == (128, 128, 128)
    assert tile("int8_matmul", 2048, 3072, 768) == (64, 128, 128)  # of 128 x 128 there are 1.5 rounds
    assert tile("int8_matmul", 2048, 768, 768) == tile("int8_matmul", 512, 768, 768) == (64, 64, 128)
    for m in (1, 64):
        assert tuning.choose("int8_matmul", CPU, m, 768, 768).split_k == 768 // 256  # two steps or more to a program
    assert tuning.choose("int8_matmul", CPU, 16, 8192, 8192).split_k == 2  # two programs per multiprocessor are enough
    assert tuning.choose("four_bit_dot", CPU, 16, 8192, 8192).split_k == 4  # two warps each: four programs, then
    assert tile("four_bit_gemv", 1, 8192, 8192) == (1, 16, 256)
    assert tile("four_bit_gemv", 1, 4096, 4096) == (1, 16, 512)
    assert tile("four_bit_gemv", 1, 3072, 768) == tile("four_bit_gemv", 1, 16, 768) == (1, 4, 256)


def test_every_bucket_is_open_ended_or_small() -> None:
    for kernel, families in tuning.CONFIGS.items():
        assert set(families) == {"80", "89", "90", "100"}
        for table in families.values():
            buckets = list(table)
            assert buckets == sorted(buckets)
            assert all(config.block_m >= min(16, largest) for largest, configs in table.items() for config in configs)
            assert buckets[-1] == {"four_bit_gemv": 4, "four_bit_dot": 64}.get(kernel, tuning.LARGE)


def test_families() -> None:
    families = {80: "80", 86: "89", 87: "80", 89: "89", 90: "90", 100: "100", 103: "100", 120: "89"}
    assert {capability: tuning.family(capability) for capability in families} == families


def test_tuning_keeps_the_fastest(h100: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {(16, 32, 512): 1.0, (16, 64, 128): 3.0}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_time", lambda run: run())

    def run(config: Config, problem: str) -> float:
        assert problem == "data"
        if config.block_k == 256:
            raise tuning.OutOfResources(1 << 20, 1 << 18, "shared memory")
        return times[config.block_m, config.block_n, config.block_k] + config.split_k / 100

    before = tuning.choose("int8_matmul", CPU, 9, 512, 4096)
    measured = tuning.tune("int8_matmul", CPU, 9, 512, 4096, lambda: "data", run, 1000)
    assert {config.block_k for config in measured} == {512, 128}
    tuned = tuning.choose("int8_matmul", CPU, 9, 512, 4096)
    assert (tuned.block_k, tuned.split_k) == (512, 1) != (before.block_k, before.split_k)
    assert tuning.choose("int8_matmul", CPU, 16, 512, 4096) == tuned  # the same bucket
    assert tuning.choose("int8_matmul", CPU, 17, 512, 4096) != tuned
    assert list(json.loads(h100.read_text())) == [device.name(CPU)]
    assert [path.name for path in h100.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("m", [1, 20])
def test_the_kernels_are_tuned(h100: Path, monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    """Each candidate is launched, on data that fits."""
    launched = []
    monkeypatch.setattr(device, "INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_time", lambda run: run() is None)
    for module in (int8, four_bit, row_quantize):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **constants: launched.append(kernel.__name__))
    for module, kernel, name in ((int8, "int8_matmul_kernel", "int8_matmul"), (four_bit, None, None)):
        name = name or ("four_bit_gemv" if m <= 2 else "four_bit_dot")
        kernel = kernel or ("gemv_4bit_kernel" if m <= 2 else "dot_4bit_kernel")
        times = module.tune(m, 96, 128, CPU)
        assert launched.count(kernel) == len(times) >= len(tuning.candidates(name, 90, m))
    assert len(json.loads(h100.read_text())[device.name(CPU)]) == 2


def test_nothing_is_tuned_in_a_capture(h100: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot run inside a CUDA graph capture; call it before that"):
        tuning.tune("four_bit_gemv", CPU, 1, 64, 64, lambda: None, lambda config, problem: None, 1000)
    assert not h100.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": {"b": {"block_q": 1}}}', '{"a": 3}', '{"a": {"b": {"block_m": "1"}}}', "\0"]
)
def test_a_damaged_file_is_reported_and_not_used(h100: Path, content: str) -> None:
    expected = tuning.choose("four_bit_gemv", CPU, 1, 4096, 4096)
    h100.write_text(content)
    tuning.choose.cache_clear()
    with pytest.warns(UserWarning, match="is no file of tuned configurations"):
        assert tuning.choose("four_bit_gemv", CPU, 1, 4096, 4096) == expected


# ---- the benchmark

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_benchmark(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARKS / "bench_cuda.py"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_benchmark_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run_benchmark("--dry", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["table"] for row in rows} == {"int8", "nf4", "memory", "bert"}
    assert all(
        row["us"] > 0 for row in rows if row["contender"].startswith("pyqkern") or row["table"] in ("memory", "bert")
    )
    again = run_benchmark("--plot-only", str(out))
    assert again.returncode == 0 and "INT8 linear, bf16 out" in again.stdout


def test_the_benchmark_wants_a_gpu() -> None:
    done = run_benchmark(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device; --dry checks the script without one" in done.stderr
    assert run_benchmark("--only", "int4").returncode == 2


def test_goals_take_the_worst_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from cuda_report import Report, Row, goals

    def row(contender: str, m: int, us: float | None) -> Row:
        return Row("nf4", contender, (m, 8192, 8192), us, bytes=40_000_000)

    rows = [row("pyqkern", 1, 20.0), row("torch bf16", 1, 42.0), row("bitsandbytes", 1, None)]
    rows += [row("pyqkern", 4096, 100.0), row("torch bf16", 4096, 95.0)]
    rows += [row("pyqkern", 16384, 100.0), row("torch bf16", 16384, 85.0)]
    found = {name: (measured, reached) for name, _, measured, reached in goals(Report({}, {"copy GB/s": 4000.0}, rows))}
    assert found["NF4, batch 1, 8192^2, share of the copy bandwidth"] == ("0.50", "NO")  # 40 MB in 20 us: 2000 GB/s
    assert found["the same, against bf16"] == ("2.10", "yes")
    assert found["the same, against bitsandbytes"] == ("-", "not measured")
    assert found["NF4, M >= 4096, 8192^2, against bf16"] == ("0.85", "NO")
    assert found["INT8, M, K, N >= 4096, against bf16"] == ("-", "not measured")


# ---- on a GPU


def test_a_graph_captures_a_model() -> None:
    require("cuda", "CUDA graphs are not checked")
    for scheme in ("int8", "nf4"):
        model = pyqkern.replace_linear(nn.Sequential(nn.Linear(96, 33), nn.ReLU(), nn.Linear(33, 2)), scheme).cuda()
        static, other = torch.randn(2, 5, 96, device="cuda")
        with torch.no_grad():
            expected, graph = model(other), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(static)
            static.copy_(other)
            graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)
