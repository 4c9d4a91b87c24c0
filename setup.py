"""Builds pyqkern._C: one static library per instruction set, so that an ISA's flags reach that ISA's file alone."""

import os
import platform
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_clib import build_clib


def accepted(*flags: str) -> list[str]:
    """Those of the flags that the compiler knows."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    empty = ["-Werror", "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return [flag for flag in flags if subprocess.run([*compiler, flag, *empty], capture_output=True).returncode == 0]


# -ffp-contract=off: an fma only where the source says fma, so that every ISA gives the same bits.
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# g++ 12's partial redundancy elimination copies every accumulator in each step of the product's inner loop, at a third
# of the speed; its headers also use undefined vectors on purpose, and warn of it. clang has neither.
KERNELS = [*COMMON, *accepted("-fno-tree-pre", "-Wno-maybe-uninitialized", "-Wno-uninitialized")]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISAS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512vnni": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
    }


class BuildLibraries(build_clib):
    """Compiles the libraries side by side: each is one file, which takes up to a minute."""

    def build_libraries(self, libraries: list[Any]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


ParallelCompile(default=0).install()  # the extension's files too, on as many threads as there are CPUs

SOURCES = [str(path) for folder in ("csrc", "csrc/python") for path in sorted(Path(folder).glob("*.cpp"))]
HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in (".h", ".inl")]

setup(
    cmdclass={"build_clib": BuildLibraries},
    libraries=[
        (
            f"pyqkern_{isa}",
            {
                "sources": [f"csrc/kernels/isa_{isa}.cpp"],
                "include_dirs": ["csrc"],
                "obj_deps": {"": HEADERS},
                "cflags": [*KERNELS, *flags],
            },
        )
        for isa, flags in ISAS.items()
    ],
    ext_modules=[
        Pybind11Extension(
            "pyqkern._C",
            SOURCES,
            include_dirs=["csrc"],
            depends=HEADERS,
            extra_compile_args=COMMON,
            libraries=["dl", "pthread"],
        )
    ],
)
