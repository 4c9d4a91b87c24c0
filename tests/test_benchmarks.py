"""Every benchmark for CPUs runs, with tiny shapes: what the pages call, and every other way through it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import SENTENCES

ROOT = Path(__file__).resolve().parents[1]
PAGES = " ".join(
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("performance", "training", "generation", "guide", "bulk")
)

WAYS = {
    "bench_affine.py": ["--json r.json --plot r.png"],
    "bench_int8.py": ["--json r.json --plot r.png", "--cold --isa all", "--matmul --threads 2"],
    "bench_nf4.py": ["--json r.json", "--cold --isa scalar", "--tensors", "--models"],
    "bench_model.py": ["--models minilm --sizes 2x8-16 --json r.json --plot r.png"],
    "bench_experts.py": ["--json r.json", "--isa all --schemes int8 --m 2"],
    "bench_recurrent.py": ["--json r.json", "--errors"],
    "bench_accuracy.py": [],
    "bench_auto.py": [],
    "bench_bulk.py": [],
    "bench_generate.py": ["--json r.json", "--models qwen2-0.5b --agreement"],
    "bench_qat.py": ["--json r.json", "--data FOLDER"],
    "bench_qlora.py": ["--rounds 2 --contenders pyqkern,float --checkpointing"],
    "bench_training.py": ["--json r.json", "--threads 2 --optimizers SGD,Lion", "--data FOLDER"],
}
ON_PAGES = re.findall(r"`python benchmarks/(\w+\.py)([^`]*)`", re.sub(r"\s+", " ", PAGES))

# One process for all calls of a benchmark: most of the time goes into importing torch.
RUN = """
import runpy, shlex, sys
sys.path.insert(0, sys.argv[1])
script, *calls = sys.argv[2:]
for call in calls:
    sys.argv = [script, *shlex.split(call), "--dry"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{script} {call}: {end.code}")
"""


def calls_of(script: str) -> list[str]:
    """Those of the pages, then the rest; in one process, and without --peers, which must be installed for."""
    found = [options for name, options in ON_PAGES if name == script]
    listed = [re.sub(r"--peers( (?!--)\S+)?|--isolate", "", options).strip() for options in found]
    return list(dict.fromkeys([*listed, *WAYS[script]]))


def test_every_benchmark_is_listed() -> None:
    scripts = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts == {*WAYS, "bench_cuda.py"}  # which test_launch.py runs
    assert {name for name, _ in ON_PAGES} == scripts


@pytest.mark.parametrize("script", WAYS)
def test_a_benchmark_runs(script: str, tmp_path: Path) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text,label\n" + "".join(f'"{text}",{i % 2}\n' for i, text in enumerate(SENTENCES)))
    words = {"FOLDER": f"{data} --cache {tmp_path}", "TEXTS": str(data)}
    calls = [re.sub("|".join(words), lambda found: words[found[0]], call) for call in calls_of(script)]
    command = [sys.executable, "-c", RUN, str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / script), *calls]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes compiles
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(calls)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert "failed" not in done.stdout, done.stdout
    written = {name for call in calls for name in re.findall(r"r\.\w+", call)}
    assert written == {path.name for path in tmp_path.glob("r.*")}
