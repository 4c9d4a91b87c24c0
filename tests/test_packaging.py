"""What is told to others about the package: its version, its citation, and where its parts are."""

import importlib.metadata
from pathlib import Path

import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest needs it
    import tomli as tomllib  # type: ignore[no-redef]

import pyqkern

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_there_is_one_version() -> None:
    version = PROJECT["project"]["version"]
    assert pyqkern.__version__ == importlib.metadata.version("pyqkern") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_folder_with_python_is_packaged() -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pyqkern").rglob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"pyqkern.kernels"}


def test_the_citation_has_what_the_format_asks_for() -> None:
    """https://github.com/citation-file-format: four required fields, and names of its own for types and authors."""
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0" and said["message"] and said["title"] and said["type"] == "software"
    assert said["authors"] == [{"name": "The pyqkern developers"}]
    assert said["license"] == PROJECT["project"]["license"]
    known = {"cff-version", "message", "title", "type", "authors", "license", "version", "abstract", "keywords"}
    assert set(said) <= known


def test_wheels_are_built_for_every_python_that_is_named() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    build = PROJECT["tool"]["cibuildwheel"]["build"]
    assert build == [f"cp3{minor}-manylinux*" for minor in range(10, 15)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    assert workflow["jobs"]["wheels"]["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
