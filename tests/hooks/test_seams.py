"""Seams: each one has the signature it counts on in every supported vLLM, whose wheel is read as text, not installed.

The first run downloads one wheel (about 330 MB) for each supported version and keeps only its Python sources.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_specplug.hooks import seam_list, seams
from vllm_specplug.hooks.seams import Seam

Root = Path | zipfile.Path
"""The parent of the folder ``vllm``: a site-packages folder, or a zip file of a wheel's sources."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

INSTALLED = "installed"
VERSIONS = [version for minor in range(100) if (version := f"0.{minor}.0") in SpecifierSet(seams.SUPPORTED_VLLM)]
SEAM_TUPLES = {
    name: value
    for name, value in vars(seam_list).items()
    if isinstance(value, tuple) and value and all(isinstance(element, Seam) for element in value)
}
SEAMS = list(dict.fromkeys(seam for group in SEAM_TUPLES.values() for seam in group))
ELSEWHERE = [seam for seam in SEAMS if not seam.module.startswith("vllm.")]  # in a package that vLLM uses

# pip takes these tags literally: 2_28 would not match a wheel for a later glibc.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux2014_x86_64")
MIN_FREE_BYTES = 10**9  # the wheel, and the copy pip makes of it
DOWNLOAD_TIMEOUT_S = 240
STALE_AFTER_S = 3600
MAX_IMPORT_HOPS = 8


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specplug-wheels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def wheel_sources(version: str) -> Path | str:
    """Path of a zip file of the Python sources in vLLM's CUDA wheel, downloaded once; or why there is none."""
    folder = cache_folder()
    kept = folder / f"vllm-{version}-sources.zip"
    if kept.exists():
        return kept
    for leftover in folder.glob("download-*"):  # left by a killed run; a young one may belong to a run still at work
        if time.time() - leftover.stat().st_mtime > STALE_AFTER_S:
            shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
        return f"{free / 1e9:.1f} GB free under {folder}, {MIN_FREE_BYTES / 1e9:.1f} GB needed"
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        if error := download(version, Path(temporary)):
            return error
        packed = Path(temporary) / "sources.zip"
        pack_sources(next(Path(temporary).glob("*.whl")), packed)
        packed.replace(kept)  # in one step: a killed run leaves no half file under this name
    return kept


def download(version: str, folder: Path) -> str:
    """Let pip put vLLM's wheel into ``folder``; returns why it cannot, or ""."""
    # Nothing is installed, so that any machine can read the same Linux wheel, whatever tags its interpreter has.
    target = ["--python-version=3.11", "--implementation=cp", "--abi=abi3", *(f"--platform={tag}" for tag in PLATFORMS)]
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps", "--only-binary=:all:", *target]
    command += ["--dest", str(folder), "--no-cache-dir", "--retries=1", "--timeout=20", "--quiet"]
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            env={**os.environ, "TMPDIR": str(folder)},  # pip downloads there first: the disk whose free space is known
        )
    except subprocess.TimeoutExpired:
        return f"pip needed more than {DOWNLOAD_TIMEOUT_S} s to download vllm=={version}"
    except subprocess.CalledProcessError as error:
        # The first error says whether there is no network or no such version; pip may list hundreds of versions.
        errors = [line for line in error.stderr.splitlines() if line.startswith("ERROR: ")] or [error.stderr]
        return f"pip cannot download vllm=={version}: {textwrap.shorten(errors[0], 160)}"
    return ""


def pack_sources(wheel: Path, packed: Path) -> None:
    """Copy all Python files of ``wheel`` into the zip file ``packed``: later seams may be in any of them."""
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as sources:
        for name in whole.namelist():
            if name.endswith(".py"):
                sources.writestr(name, whole.read(name))


@functools.cache
def installed_sources() -> Path | str:
    """The folder that the installed vLLM is in, or why there is none."""
    spec = importlib.util.find_spec("vllm")  # finds it without importing it
    if spec is None or spec.origin is None:
        return "vLLM is not installed"
    return Path(spec.origin).parent.parent


@functools.cache
def opened(where: Path) -> Root:
    return zipfile.Path(where) if where.is_file() else where


def root_of(label: str) -> Root:
    """The sources that ``label`` names, a version or INSTALLED; skips the test if they cannot be read."""
    sources = installed_sources() if label == INSTALLED else wheel_sources(label)
    if isinstance(sources, str):
        pytest.skip(sources)
    return opened(sources)


@functools.cache
def parsed(root: Root, module: str) -> tuple[ast.Module, bool] | None:
    """The syntax tree of a module, and whether it is a package; None if there is no such module."""
    path = module.replace(".", "/")
    for candidate, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
        if (file := root / candidate).is_file():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about vLLM's own string escapes
                return ast.parse(file.read_text(encoding="utf-8")), is_package
    return None


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of ``body``, including those inside if, try and with."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            # Imports for type checkers do not run, so that no seam is among them.
            if "TYPE_CHECKING" not in ast.unparse(statement.test):
                yield from statements(statement.body)
            yield from statements(statement.orelse)
        elif isinstance(statement, ast.Try):
            handlers = [inner for handler in statement.handlers for inner in handler.body]
            yield from statements([*statement.body, *handlers, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.With):
            yield from statements(statement.body)


def find(root: Root, module: str, name: str, hops: int = MAX_IMPORT_HOPS) -> tuple[str, Definition] | None:
    """The module that defines a dotted name of ``module``, after following imports, and the definition."""
    if hops == 0 or module.split(".")[0] != "vllm" or (tree_and_kind := parsed(root, module)) is None:
        return None
    tree, is_package = tree_and_kind
    first, *rest = name.split(".")
    definition: tuple[str, Definition] | None = None
    for statement in statements(tree.body):  # the last binding counts, as it does at run time
        if isinstance(statement, Definition) and statement.name == first:
            definition = module, statement
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == first:
                    source = imported_module(statement, module, is_package)
                    definition = find(root, source, alias.name, hops - 1) or definition
    for part in rest:
        if definition is not None:
            definition = find_member(root, *definition, part, hops)
    return definition


def imported_module(statement: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of the module that a ``from ... import`` in ``module`` imports from."""
    if statement.level == 0:
        return statement.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - statement.level + is_package]
    return ".".join([*parents, *([statement.module] if statement.module else [])])


def find_member(
    root: Root, module: str, owner: Definition, name: str, hops: int = MAX_IMPORT_HOPS
) -> tuple[str, Definition] | None:
    """The module that defines a method of the class ``owner``, its own or inherited, and the definition."""
    if not isinstance(owner, ast.ClassDef):
        return None
    own = [inner for inner in statements(owner.body) if isinstance(inner, Definition) and inner.name == name]
    if own:
        return module, own[-1]
    for base in owner.bases:
        base_name = base.value if isinstance(base, ast.Subscript) else base  # Base[T] is Base
        if isinstance(base_name, ast.Name) and (parent := find(root, module, base_name.id, hops - 1)) is not None:
            inherited = find_member(root, *parent, name, hops - 1)
            if inherited is not None:
                return inherited
    return None


def parameters_of(root: Root, seam: Seam) -> tuple[str, ...] | None:
    """Parameter names as inspect.signature lists them, a class's without self; None if the name is missing."""
    found = find(root, seam.module, seam.name)
    if found is None:
        return None
    module, definition = found
    if isinstance(definition, ast.ClassDef):
        found = find_member(root, module, definition, "__init__")
        return () if found is None else arguments(found[1])[1:]
    return arguments(definition)


def arguments(function: Definition) -> tuple[str, ...]:
    assert not isinstance(function, ast.ClassDef)
    taken = function.args
    in_order = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
    return tuple(argument.arg for argument in in_order if argument is not None)


def complaint(root: Root, seam: Seam) -> str:
    """What is wrong with a seam in these sources; "" if nothing is."""
    parameters = parameters_of(root, seam)
    if parameters is None:
        return "" if seam.optional else f"there is no {seam.module}.{seam.name}"
    if parameters[: len(seam.parameters)] != seam.parameters:
        return (
            f"{seam.module}.{seam.name} takes ({', '.join(parameters)}), expected ({', '.join(seam.parameters)}, ...)"
        )
    return ""


def seam_id(seam: Seam) -> str:
    return f"{seam.module}.{seam.name}"


def test_there_are_seams_and_each_says_why() -> None:
    assert SEAMS
    assert VERSIONS
    # Seams that are not in one of these tuples would not be checked.
    assert {name for name in vars(seam_list) if name.endswith("SEAMS")} <= set(SEAM_TUPLES)
    assert [seam_id(seam) for seam in SEAMS if not seam.why.strip()] == []


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam not in ELSEWHERE], ids=seam_id)
@pytest.mark.parametrize("label", [*VERSIONS, INSTALLED])
def test_signature(label: str, seam: Seam) -> None:
    assert complaint(root_of(label), seam) == ""


@pytest.mark.parametrize("seam", ELSEWHERE, ids=seam_id)
def test_signature_elsewhere(seam: Seam) -> None:
    wrapper = seams.Patches()
    wrapper.install([seam], {seam.name: lambda original, *given: original(*given)})  # raises if it does not fit
    assert wrapper.installed
    wrapper.undo()


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam.optional], ids=seam_id)
def test_an_optional_seam_exists_somewhere(seam: Seam) -> None:
    """Else a misspelt optional seam would never be wrapped, without any error."""
    assert any(parameters_of(root_of(label), seam) is not None for label in [INSTALLED, *VERSIONS])


RUNNER = """
from typing import TYPE_CHECKING

import torch
from elsewhere import Stranger
from vllm.sampler import Sampler, make as build
if TYPE_CHECKING:
    from vllm.sampler import Hidden

class Base(torch.nn.Module):
    def inherited(self, a, /, b, *, c=None): ...

class Runner(Base, Stranger):
    if True:
        @torch.inference_mode()
        async def step(self, batch, *rest, flag=False, **options): ...

try:
    import numba
except ImportError:
    def fallback(x): ...
"""
SAMPLER = """
from .ops import Generic, make
class Sampler(Generic[int]):
    def forward(self, logits): ...
class Hidden:
    def method(self): ...
"""
OPS = """
class Generic:
    def __init__(self, config, device): ...
@overload
def make(config: int): ...
def make(config, device): ...
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Small sources with imports, a package, inheritance, decorators, overloads and a module that imports itself."""
    (tmp_path / "vllm" / "sampler").mkdir(parents=True)
    for name, text in (("runner.py", RUNNER), ("sampler/__init__.py", SAMPLER), ("sampler/ops.py", OPS)):
        (tmp_path / "vllm" / name).write_text(text, encoding="utf-8")
    (tmp_path / "vllm" / "ops.py").write_text("from vllm.ops import endless\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Runner.step", ("self", "batch", "rest", "flag", "options")),
        ("Runner.step", ("self", "batch")),
        ("Runner.inherited", ("self", "a", "b", "c")),
        ("Sampler", ("config", "device")),
        ("Sampler.forward", ("self", "logits")),
        ("build", ("config", "device")),
        ("fallback", ("x",)),
    ],
)
def test_the_check_accepts_what_is_there(sources: Path, name: str, parameters: tuple[str, ...]) -> None:
    assert complaint(sources, Seam("vllm.runner", name, parameters, "a test")) == ""


@pytest.mark.parametrize(
    ("name", "parameters", "part"),
    [
        ("Runner.step", ("self", "scheduled"), "takes (self, batch, rest, flag, options), expected (self, scheduled"),
        ("Runner.step", ("batch",), "expected (batch, ...)"),
        ("Runner.inherited", ("self", "b"), "takes (self, a, b, c)"),
        ("Sampler", ("self", "config"), "takes (config, device)"),
        ("build", ("config", "device", "more"), "takes (config, device)"),
    ],
)
def test_the_check_fails_on_a_changed_signature(
    sources: Path, name: str, parameters: tuple[str, ...], part: str
) -> None:
    for optional in (False, True):
        assert part in complaint(sources, Seam("vllm.runner", name, parameters, "a test", optional))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.runner", "stop"),
        ("vllm.runner", "Runner.stop"),
        ("vllm.runner", "Runner.step.more"),
        ("vllm.runner", "step"),
        ("vllm.runner", "make"),
        ("vllm.runner", "Hidden"),
        ("vllm.runner", "Stranger"),
        ("vllm.ops", "endless"),
        ("vllm.gone", "Runner"),
    ],
)
def test_the_check_fails_on_a_missing_name(sources: Path, module: str, name: str) -> None:
    assert complaint(sources, Seam(module, name, (), "a test")) == f"there is no {module}.{name}"
    assert complaint(sources, Seam(module, name, (), "a test", optional=True)) == ""


def test_sources_of_a_wheel_read_the_same(sources: Path, tmp_path: Path) -> None:
    wheel, packed = tmp_path / "vllm-0-py3-none-any.whl", tmp_path / "sources.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_C.so", b"\0" * 1000)
        for file in sources.rglob("*.py"):
            archive.write(file, file.relative_to(sources))
    pack_sources(wheel, packed)
    root = opened(packed)
    assert not (root / "vllm" / "_C.so").exists()
    assert complaint(root, Seam("vllm.runner", "Sampler", ("config", "device"), "a test")) == ""
    assert "takes (self, logits)" in complaint(root, Seam("vllm.runner", "Sampler.forward", ("x",), "a test"))
