"""What the sdist and the wheel in a folder hold: `contents.py FOLDER`, called by .ci/wheel in the root."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

FOLDER = Path(sys.argv[1])
SDIST, WHEEL = next(FOLDER.glob("*.tar.gz")), next(FOLDER.glob("*.whl"))
OF_SDIST = ["csrc", "kernels", "pyqkern", "docs", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt"]
OF_SDIST += ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]


def files(*paths: str) -> dict[str, bytes]:
    """The repository's files under these paths, and their bytes."""
    listed = subprocess.run(["git", "ls-files", "-z", *paths], capture_output=True, text=True, check=True).stdout
    return {name: Path(name).read_bytes() for name in listed.split("\0") if name}


def check(what: str, expected: dict[str, bytes], found: dict[str, bytes], others: set[str] = frozenset()) -> None:
    """Exits unless `found` has all that is expected, byte by byte, and otherwise only `others`."""
    missing = [name for name in expected if found.get(name) != expected[name]]
    more = sorted(set(found) - set(expected) - others)
    if missing or more:
        sys.exit(f"{what}: missing or different: {missing[:9]}; not expected: {more[:9]}")
    print(f"{what}: {len(found)} files, {sum(map(len, found.values())) / 1e6:.1f} MB")


with tarfile.open(SDIST) as archive:
    members = [member for member in archive if member.isfile()]
    of_sdist = {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}
generated = {name for name in of_sdist if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
check(SDIST.name, files(*OF_SDIST), of_sdist, generated)

with zipfile.ZipFile(WHEEL) as archive:
    of_wheel = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
expected = files("pyqkern") | {f"pyqkern/{name}": data for name, data in files("kernels").items()}
extensions = {name for name in of_wheel if name.startswith("pyqkern/_C.") and name.endswith(".so")}
about = {name for name in of_wheel if ".dist-info/" in name}
check(WHEEL.name, expected, of_wheel, extensions | about)

metadata = BytesParser().parsebytes(of_wheel[next(name for name in about if name.endswith("/METADATA"))])
version = metadata["Version"]
licence = next(data for name, data in of_wheel.items() if name.endswith("/licenses/LICENSE"))
for right, rule in (
    (len(extensions) == 1, "the wheel must have one extension"),
    ("manylinux" in WHEEL.name, "the wheel must be one for manylinux"),
    (licence == Path("LICENSE").read_bytes(), "the wheel must have the licence"),
    (f"-{version}-" in WHEEL.name and f"-{version}.tar" in SDIST.name, "sdist and wheel must have one version"),
):
    if not right:
        sys.exit(f"{rule}, got {WHEEL.name}")
