"""Builds pyqkern._C: one static library per instruction set, so that an ISA's flags reach that ISA's file alone."""

import hashlib
import os
import platform
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_clib import build_clib

COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def accepted(*flags: str) -> list[str]:
    """Those of the flags that the compiler knows."""
    empty = ["-Werror", "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return [flag for flag in flags if subprocess.run([*COMPILER, flag, *empty], capture_output=True).returncode == 0]


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


def objects_folder(name: str, *depends: object) -> str:
    """Where objects are kept, in build/: a folder for each compiler, its flags and what else they depend on.

    An editable install has temporary folders alone, and would compile everything whenever it is repeated.
    """
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout
    of_user = [os.environ.get(variable) for variable in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS")]
    key = repr((COMPILER, version, of_user, sysconfig.get_config_var("CFLAGS"), platform.machine(), depends))
    return f"build/{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def is_old(made: str, source: str) -> bool:
    """Whether an object is older than what it is made of."""
    if not os.path.exists(made):
        return True
    return os.path.getmtime(made) < max(map(os.path.getmtime, [source, *HEADERS]))


class BuildLibraries(build_clib):
    """Compiles the libraries side by side: each is one file, which takes up to a minute."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = self.build_clib = objects_folder("kernels", KERNELS, ISAS)

    def build_libraries(self, libraries: list[Any]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


class BuildExtension(build_ext):
    """The rest, on as many threads as there are CPUs."""

    def finalize_options(self) -> None:
        super().finalize_options()
        of_python = sysconfig.get_config_var("EXT_SUFFIX"), pybind11.__version__
        self.build_temp = objects_folder("extension", COMMON, *of_python)


ParallelCompile(default=0, needs_recompile=is_old).install()

SOURCES = [str(path) for folder in ("csrc", "csrc/python") for path in sorted(Path(folder).glob("*.cpp"))]
HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in (".h", ".inl")]

setup(
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtension},
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
