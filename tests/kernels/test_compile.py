"""Every Triton kernel, in every configuration of the table, compiled for devices that are not there.

Each launcher is run on CPU tensors with a driver that only names a device, so that what is compiled is what would be
launched: the same types, the same divisibility of sizes and addresses. Triton needs processes of its own for that,
without TRITON_INTERPRET: this file, run as a script, is one.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

CAPABILITIES = (80, 89, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one block, CUDA C guide, table 21
M, N, K = 8192, 4096, 4096


@dataclass
class Compiled:
    """What the tests look at of one compiled kernel."""

    kernel: str
    config: dict[str, Any] | None  # the entry of the table; None for a kernel without one
    shared: int  # bytes per block
    stack: int  # bytes per thread: registers that ptxas had to spill
    cubin: int  # bytes
    ptx: list[str]  # the distinct instructions that load, store and multiply


def interesting(ptx: str) -> list[str]:
    pattern = r"^\s+(?:@!?%p\d+ )?((?:ld|st)\.global\S*|cp\.async\S*|\S*mma\S*)(?:[^\n]*(0x\d+), %r)?"
    return sorted({" ".join(filter(None, match.groups())) for match in re.finditer(pattern, ptx, re.MULTILINE)})


def stack_bytes(cubin: bytes) -> int:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(size) for size in re.findall(r"STACK:(\d+)", report.stdout))


def compile_all(capability: int) -> list[Compiled]:
    """Compiles for one capability; runs in a process of its own."""
    import torch
    from pyqkern.kernels import affine, device, fake_quantize, four_bit, int8, optimizer, row_quantize, tuning
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NamesADevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

    driver.set_active(NamesADevice())
    device.INTERPRETED = True  # lets CPU tensors pass
    device.capability = int8.capability = lambda _: capability
    device.processors = int8.processors = lambda _: 132
    found: list[Compiled] = []
    current: list[dict[str, Any] | None] = [None]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled is not None:  # None: compiled before
            cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
            config = current[0] if "split_k" not in self.__name__ else None
            found.append(
                Compiled(
                    self.__name__, config, compiled.metadata.shared, stack_bytes(cubin), len(cubin), interesting(ptx)
                )
            )
        return compiled

    JITFunction.run = compile_only

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    bf16, u8, s8, s32 = torch.bfloat16, torch.uint8, torch.int8, torch.int32
    for shape in ((1, 1, M * K), (1, N, K), (N, K, 1)):
        q = affine.quantize(empty(*shape, dtype=bf16), empty(shape[1]), empty(shape[1], dtype=s32), s8, shape[1] == 1)
        affine.dequantize(q, empty(shape[1]), None, bf16)
    for dtype, scales, zero in ((torch.float32, empty(N), None), (bf16, empty(1), empty(1, dtype=s32))):
        x = empty(N, K, dtype=dtype)
        fake_quantize.fake_quantize(x, K, scales, zero, 0, 255)
        fake_quantize.fake_quantize_backward(x, x, K, scales, zero, 0, 255)
    for k in (768, 3072, 20000):
        x, vector = empty(M, k, dtype=bf16), empty(k)
        row_quantize.quantize_rows(x, False)
        row_quantize.quantize_rows_static(x, empty(), empty(dtype=s32), 7)
        row_quantize.gelu_quantize_rows(x, True)
        row_quantize.layer_norm_quantize_rows(x, vector, vector, 1e-5, False, x)
    int8.int8_matmul(empty(M, K, dtype=u8), empty(N, K, dtype=s8))
    for dtype in (torch.float32, bf16):
        how, p, codes, scales = ([0.5] * 10, empty(2, 31)), empty(N, K, dtype=dtype), empty(N, K, dtype=u8), empty(N)
        optimizer.optimizer_step("adam", *how, p, p, codes, codes, scales, scales)
        for rule in ("momentum", "lion"):
            optimizer.optimizer_step(rule, *how, p, p, codes, None, scales, None)
        optimizer.optimizer_step("adam", *how, p, p, empty(N, K), empty(N, K), None, None)
    packed4, absmax, absmax8 = empty(N * K // 2, dtype=u8), empty(N * K // 64), empty(N * K // 64, dtype=u8)
    nested = (empty(N * K // 64 // 256), empty(256), empty())
    for quant_type, blocksize in (("nf4", 64), ("fp4", 4096)):
        four_bit.quantize_4bit(empty(N, K, dtype=bf16), quant_type, blocksize)
    plain4, nested4 = (packed4, absmax, None, None, None), (packed4, absmax8, *nested)
    for weight in (plain4, nested4):
        four_bit.dequantize_4bit(*weight, "nf4", 64, (N, K), bf16)

    packed8 = empty(N + 4, K, dtype=s8)
    for kernel, families in tuning.CONFIGS.items():
        for largest_m, configs in families[tuning.family(capability)].items():
            m = min(largest_m, M)
            for base in configs:
                activation = "gelu" if base == configs[0] else "none"
                config = tuning.split(base, 132, m, N, K)
                current[0] = {"kernel": kernel} | asdict(base)
                if kernel == "int8_matmul":
                    q, scale, zero_point = empty(m, K, dtype=s8), empty(m), empty(m, dtype=s32)
                    int8.int8_scaled_matmul(q, scale, zero_point, packed8, empty(N), empty(N), activation, bf16, config)
                else:
                    x, bias = empty(m, K, dtype=bf16), empty(N)
                    four_bit.linear_4bit(x, *plain4, bias, "nf4", 64, N, "auto", config)
            if kernel != "int8_matmul":
                four_bit.linear_4bit(x, *nested4, bias, "fp4", 64, N, "auto", config)
                four_bit.linear_4bit(x, packed4, empty(N * K // 32), *(None,) * 3, bias, "nf4", 32, N, "auto", config)
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([asdict(one) for one in compile_all(int(sys.argv[1]))]))
    sys.exit()


# Plain `pytest` compiles for the oldest generation and for the one with wgmma and the TMA; .ci/run for all.
LONG = [pytest.param(capability, marks=pytest.mark.long) for capability in CAPABILITIES if capability not in (80, 90)]


@pytest.fixture(scope="module", params=[80, 90, *LONG])
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def compiled(capability: int, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """What was compiled for the capability, once: a worker that comes second waits for the first one's result."""
    from require import require

    require("triton", "no kernel is compiled")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / f"compiled-{capability}.json"
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
            environment |= {"TRITON_CACHE_DIR": str(base / "triton"), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, str(capability), str(out)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"capability {capability}:\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
    return [Compiled(**one) for one in json.loads(out.read_text())]


def test_every_kernel_compiles(compiled: list[Compiled]) -> None:
    from pyqkern.kernels import affine, fake_quantize, four_bit, int8, optimizer, row_quantize

    listed = {
        name
        for module in (affine, fake_quantize, four_bit, int8, optimizer, row_quantize)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert {one.kernel for one in compiled} == listed
    assert all(one.cubin > 0 for one in compiled)


def test_every_module_with_kernels_is_listed() -> None:
    from require import require

    require("triton", "the list of kernels is not checked")
    from pyqkern.kernels import device

    with_kernels = {path.stem for path in Path(device.__file__).parent.glob("*.py") if "_kernel(\n" in path.read_text()}
    assert with_kernels == {"affine", "fake_quantize", "int8", "four_bit", "optimizer", "row_quantize"}


def test_every_configuration_compiles(compiled: list[Compiled], capability: int) -> None:
    from pyqkern.kernels import tuning

    table = [
        {"kernel": kernel} | asdict(config)
        for kernel, families in tuning.CONFIGS.items()
        for configs in families[tuning.family(capability)].values()
        for config in configs
    ]
    done = [one.config for one in compiled]
    assert [config for config in table if config not in done] == []


def test_registers_and_shared_memory_suffice(compiled: list[Compiled], capability: int) -> None:
    assert [one for one in compiled if one.stack] == []
    assert [one for one in compiled if one.shared > SHARED_MEMORY[capability]] == []


def tensor_core_instruction(capability: int, config: dict[str, Any], types: str) -> str:
    """What a dot must become: the slower instruction of an older device would compute the same."""
    if config["block_m"] < 64 or capability < 90:
        return rf"mma\.sync\.aligned\S*\.{types}"
    if capability < 100:
        return rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.{types}"
    return r"tcgen05\.mma\S*kind::(i8|f16)|mma\.sync\S*\.s32\.s8\.s8"  # Triton 3.6 has no tcgen05 for int8


@pytest.mark.parametrize(
    "kernel, types", [("int8_matmul_kernel", r"s32\.s8\.s8"), ("dot_4bit_kernel", r"f32\.bf16\.bf16")]
)
def test_tensor_cores(compiled: list[Compiled], capability: int, kernel: str, types: str) -> None:
    dots = [one for one in compiled if one.kernel == kernel and one.config is not None]
    assert len(dots) >= 3
    for one in dots:
        wanted = tensor_core_instruction(capability, one.config, types)
        assert any(re.search(wanted, instruction) for instruction in one.ptx), (wanted, one)


def test_tiles_come_in_pieces_of_16_bytes(compiled: list[Compiled], capability: int) -> None:
    """Tiles of the operands go to shared memory without registers, through the TMA or 16 bytes at a time."""
    for one in compiled:
        if one.kernel in ("int8_matmul_kernel", "gemv_4bit_kernel", "dot_4bit_kernel"):
            wide = [i for i in one.ptx if re.match(r"cp\.async\.bulk\.tensor|cp\.async\.cg\.shared\.global.* 0x10$", i)]
            assert wide, one
            # What is read in pieces of 4 bytes is absmax; in bytes, absmax where it is doubly quantized.
            narrow = [i for i in one.ptx if re.match(r"ld\.global\S*\.b(8|16)$", i)]
            assert narrow == [] or (one.kernel != "int8_matmul_kernel" and narrow == ["ld.global.b8"]), one


def test_elementwise_kernels_load_and_store_16_bytes(compiled: list[Compiled], capability: int) -> None:
    for one in compiled:
        if one.kernel not in ("int8_matmul_kernel", "gemv_4bit_kernel", "dot_4bit_kernel"):
            assert any(re.match(r"ld\.global\S*\.v4\.b32", i) for i in one.ptx), one
            wide = r"st\.global\S*\.v2\.b32" if "split_k" in one.kernel else r"st\.global\S*\.v4\.b32"
            assert any(re.match(wide, i) for i in one.ptx), one
