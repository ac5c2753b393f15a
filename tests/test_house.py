"""The layout of the project: lengths of files, public names, and contents of distributions.

``.importlinter`` says which package may import which.
"""

from __future__ import annotations

import configparser
import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from typer.main import get_command

import vllm_specplug
from vllm_specplug.cli import app
from vllm_specplug.settings import registry

ROOT = Path(__file__).parent.parent
LINKED = ("proposers", "samplers")
"""Folders at the top of the repository that are links inside the package."""
MAX_LINES = 500
LONGER: dict[str, str] = {}
"""Files that may have more lines, and why."""
ENTRY_POINTS = {
    "console_scripts": {"specplug": "vllm_specplug.cli:main"},
    "vllm.endpoint_plugins": {"specplug_stores": "vllm_specplug.hooks.endpoint:StoresEndpoint"},
    "vllm.general_plugins": {"specplug": "vllm_specplug.plugin:register"},
}


def modules(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


def test_files_are_short():
    lengths = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for folder in ("vllm_specplug", *LINKED)
        for name in modules(folder)
    }
    assert len(lengths) > 100
    assert {name for name, length in lengths.items() if length > MAX_LINES} == set(LONGER)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which vLLM imports
@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "vllm_specplug",
            [
                "ConfigurationError",
                "Proposer",
                "ProposerWithRejection",
                "Settings",
                "SpecplugError",
                "UnsupportedVersionError",
                "__version__",
                "reload_stores",
            ],
        ),
        (
            "vllm_specplug.proposers",
            ["DraftBatch", "Drafts", "Proposer", "ProposerContext", "TargetNoise", "Verified"],
        ),
        ("vllm_specplug.ray", ["BatchResult", "data_llm", "deployment", "generate", "serve_llm"]),
    ],
)
def test_public_names(module: str, names: list[str]):
    loaded = importlib.import_module(module)
    assert loaded.__all__ == names
    for name in names:
        assert getattr(loaded, name) is not None


def test_these_are_the_commands():
    assert list(get_command(app).list_commands(None)) == [
        "demo", "serve", "datastore", "replay", "couple", "bench", "tune", "top", "audit", "batch", "ray-serve",
    ]  # fmt: skip


def test_names_of_proposers():
    assert list(registry.PROPOSERS) == ["jacobi", "lookahead", "ngram", "recycling", "rest", "suffix"]
    assert registry.PROPOSER_GROUP == "vllm_specplug.proposers"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Paths of a wheel and an sdist that are built from a copy of this repository."""
    copy = tmp_path_factory.mktemp("tree") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("vllm_specplug", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,), (sdist,) = (list((copy / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def test_a_wheel_holds_each_module_once(distributions: tuple[Path, Path]):
    expected = modules("vllm_specplug") + [f"vllm_specplug/{name}" for folder in LINKED for name in modules(folder)]
    with zipfile.ZipFile(distributions[0]) as wheel:
        assert sorted(name for name in wheel.namelist() if name.endswith(".py")) == sorted(expected)
        (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        assert message_from_bytes(wheel.read(about))["Version"] == vllm_specplug.__version__
        points = configparser.ConfigParser()
        points.read_string(wheel.read(about.replace("METADATA", "entry_points.txt")).decode())
    assert {group: dict(points[group]) for group in points.sections()} == ENTRY_POINTS


def test_an_sdist_holds_each_module_once(distributions: tuple[Path, Path]):
    with tarfile.open(distributions[1]) as sdist:
        held = [name.partition("/")[2] for name in sdist.getnames() if name.endswith(".py")]
    for name in (name for folder in LINKED for name in modules(folder)):
        assert [each for each in held if each.endswith(name)] == [f"vllm_specplug/{name}"]


def test_the_changelog_names_the_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[-1] == vllm_specplug.__version__
