"""The documentation: the site builds and fetches nothing, and every example is run, or says why it is not.

A code block says how it is tested in a comment right before it: ``run`` (here, in a folder of its own), ``run with an
engine`` (here, all of them with one engine), ``run by tests/FILE.py::TEST`` or ``not run: REASON``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib

from vllm_specplug.measure.corpus import read_text, standard_library_sources
from vllm_specplug.metrics import files, series
from vllm_specplug.settings import registry
from vllm_specplug.settings.model import OWN_KEYS, Settings, parse_settings
from vllm_specplug.tiny_models import draft_path, target_path

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
QUICK_START = ROOT / "docs" / "quick-start.md"
LANGUAGES = ("bash", "console", "json", "python", "sh", "shell", "toml", "yaml", "yml")
START_TIMEOUT_S = 300
STORE = "code.specstore"


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: file that the block is in.
        line: line of the opening fence, from 1.
        language: word behind the opening fence.
        code: text between the fences.
        marks: texts of the comments right before the block.
    """

    page: Path
    line: int
    language: str
    code: str
    marks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """Every block in a language that could be run."""
    for page in PAGES:
        lines = page.read_text().splitlines()
        number = 0
        while number < len(lines):
            fence = re.fullmatch(r"( *)(`{3,})(\w*)(?: .*)?", lines[number])
            number += 1
            if fence is None:
                continue
            indent, ticks, language = fence.groups()
            first = number
            while lines[number].strip() != ticks:
                number += 1
            before = first - 2
            marks: list[str] = []
            while before >= 0 and (mark := re.fullmatch(r"\s*<!-- (.*) -->", lines[before])):
                marks.insert(0, mark[1])
                before -= 1
            code = "\n".join(line.removeprefix(indent) for line in lines[first:number])
            number += 1
            if language in LANGUAGES:
                yield Block(page, first, language, code, tuple(marks))


BLOCKS = list(blocks())


def to_run() -> Iterator[Block]:
    """Blocks marked ``run``; a block that is on two pages, once."""
    seen: set[str] = set()
    for block in BLOCKS:
        if "run" in block.marks:
            commands = {block.code}
            if block.language == "bash":
                commands = {re.sub(r"\s+#.*", "", line) for line in block.code.splitlines()}
            if not commands <= seen:
                yield block
            seen |= commands


RUN = list(to_run())


def of(*languages: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a test with the blocks of :func:`to_run` in these languages."""
    return pytest.mark.parametrize("block", [block for block in RUN if block.language in languages], ids=str)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_how_it_is_tested(block: Block) -> None:
    assert block.marks, (
        f"{block}: put a comment right before this block: <!-- run -->, <!-- run with an engine -->, "
        "<!-- run by tests/FILE.py::TEST --> or <!-- not run: REASON -->"
    )
    for mark in block.marks:
        if mark.startswith("run by "):
            for name in mark.removeprefix("run by ").split(", "):
                path, _, test = name.partition("::")
                defined = ast.walk(ast.parse((ROOT / path).read_text()))
                names = {each.name for each in defined if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
                assert test.startswith("test_"), f"{block}: {name} is no test"
                assert test in names, f"{block}: {path} has no {test}"
        elif mark.startswith("not run: "):
            assert len(mark) > len("not run: ") + 15, f"{block}: say why"
        elif mark == "run":
            assert block.language in ("bash", "json", "python", "toml"), f"{block}: nothing here runs {block.language}"
        else:
            assert (mark, block.language) == ("run with an engine", "python"), f"{block}: nobody knows {mark!r}"


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) > 25
    assert {block.language for block in RUN} == {"bash", "json", "python", "toml"}
    assert {block.page for block in BLOCKS} > {ROOT / "README.md", QUICK_START}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in code spans, from the top of the repository or of the package."""
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.py)(?:::\w+)?`", page.read_text())
    named = [path for path in named if not path.endswith("/yours.py")]
    assert not [path for path in named if not (ROOT / path).is_file() and not (ROOT / "vllm_specplug" / path).is_file()]


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 900


# ---------------------------------------------------------------------------------------------------------------------
# What runs without an engine
# ---------------------------------------------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """Few environment variables, so that an example cannot depend on others that happen to be set."""
    kept = {name: os.environ[name] for name in ("LANG", "NUMBA_CACHE_DIR", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(folder),
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def for_real(code: str) -> str:
    """The code with the tiny models in place of MODEL and SMALL."""
    code = re.sub(r"(?<![\w$])MODEL(?![\w=])", str(target_path()), code)
    return re.sub(r"(?<![\w$])SMALL(?![\w=])", str(draft_path()), code)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home: sources, notes, texts in every form, the examples, and a store."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    home = tmp_path_factory.mktemp("home")
    texts = [text for path in standard_library_sources()[:40] if (text := read_text(path))]
    for name, some in (("src", texts[:8]), ("new-project", texts[20:23])):
        (home / name).mkdir()
        for number, text in enumerate(some):
            (home / name / f"m{number}.py").write_text(text[:6000])
    (home / "notes" / "more").mkdir(parents=True)
    (home / "notes" / "more" / "a.md").write_text("# A note\n\nThat for name in os.listdir works.\n" * 20)
    records = "".join(json.dumps({"text": text[:2000]}) + "\n" for text in texts[24:28])
    (home / "chats-1.jsonl.zst").write_bytes(zstandard.compress(records.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text[:2000] for text in texts[28:30]]}), home / "more.parquet")
    (home / "big.txt").write_text(texts[30][:6000])
    subprocess.run(["gzip", "big.txt"], cwd=home, check=True)
    (home / "programs").mkdir()  # Python looks here first; in the home itself it would find half of this package
    (home / "examples").symlink_to(ROOT / "examples")
    (home / "vllm_specplug" / "tiny_models").mkdir(parents=True)
    (home / "vllm_specplug" / "tiny_models" / "tiny-target").symlink_to(target_path())
    build = ["specplug", "datastore", "build", STORE, "--tokenizer", str(target_path()), "src"]
    subprocess.run(build, cwd=home, env=environment(home), check=True, capture_output=True, timeout=120)
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """A copy of the user's home for one test."""
    return shutil.copytree(template, tmp_path / "home", symlinks=True)


def run(command: list[str], folder: Path, **more: str) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(
        command, cwd=folder, env={**environment(folder), **more}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.engine
@of("bash")
def test_shell_examples(block: Block, home: Path) -> None:
    if f"build {STORE}" in block.code:
        (home / STORE).unlink()
    run(["bash", "-euo", "pipefail", "-c", for_real(block.code)], home)
    for store in re.findall(r"build (\S+\.specstore)", block.code):
        assert (home / store).is_file()


@pytest.mark.engine
@of("python")
def test_python_examples(block: Block, home: Path) -> None:
    (home / "programs" / "example.py").write_text(for_real(block.code))
    run([sys.executable, "programs/example.py"], home, PYTHONPATH="examples")


@of("toml")
def test_toml_examples(block: Block) -> None:
    for group in tomllib.loads(block.code)["project"]["entry-points"]:
        assert group in (registry.PROPOSER_GROUP, registry.SAMPLER_GROUP)


def test_the_proposer_of_the_page_is_the_one_in_examples() -> None:
    source = (ROOT / "examples" / "my_proposer.py").read_text()
    assert source[source.index("from itertools") :] in (ROOT / "docs/how-to/own-proposer.md").read_text()


@pytest.mark.engine
def test_the_numbers_of_the_sampler_example(home: Path) -> None:
    (block,) = (each for each in RUN if each.page.name == "own-sampler.md" and "chisquare" in each.code)
    (home / "programs" / "example.py").write_text(block.code)
    printed = re.findall(r"\d\.\d{3}", run([sys.executable, "programs/example.py"], home, PYTHONPATH="examples"))
    assert len(printed) == 4
    assert "It prints {} against {}, {} and {}".format(*printed) in block.page.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Every speculative_config
# ---------------------------------------------------------------------------------------------------------------------


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the dictionary of every speculative_config in the README and the pages."""
    for block in BLOCKS:
        if block.language == "json":
            yield str(block), json.loads(block.code)
        elif block.language == "bash":
            words = shlex.split(block.code, comments=True)
            for before, word in pairwise(words):
                if before in ("--speculative-config", "--config") and "{" in word:
                    yield str(block), json.loads(word.partition("=")[2] if before == "--config" else word)
        elif block.language == "python":
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.keyword) and node.arg == "speculative_config":
                    yield str(block), ast.literal_eval(node.value)
    for page in PAGES:
        for span in re.findall(r"`(\{\s*\"[^`]*\})`", page.read_text()):
            with contextlib.suppress(ValueError):  # an ellipsis, or a word to fill in: not for pasting
                config = json.loads(span)
                if "method" in config:
                    yield f"{page.relative_to(ROOT)}, {span}", config
                elif "name" in config:
                    yield f"{page.relative_to(ROOT)}, {span}", {"method": "specplug", "proposers": [config]}


def with_real_files(value: Any, store: Path) -> Any:
    """The configuration with the tiny models and a real store in place of its names."""
    if isinstance(value, dict):
        return {key: with_real_files(each, store) for key, each in value.items()}
    if isinstance(value, list):
        return [with_real_files(each, store) for each in value]
    return for_real(str(store) if str(value).endswith(".specstore") else value) if isinstance(value, str) else value


READ_BY_VLLM = """
import json, sys
from vllm.engine.arg_utils import EngineArgs

answers = []
for config in json.load(open("configs.json")):
    try:
        EngineArgs(model=sys.argv[1], max_model_len=1024, speculative_config=config or None).create_engine_config()
        answers.append("")
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
json.dump(answers, open("answers.json", "w"))
"""


@pytest.mark.engine
def test_every_speculative_config_is_read(home: Path) -> None:
    """vLLM with this plugin takes it, up to the point at which a model would be loaded."""
    places, as_written = zip(*configurations(), strict=True)
    assert len(as_written) > 12
    configs = [with_real_files(config, home / STORE) for config in as_written]
    for config in configs:
        if any(each.get("name") == "rest" for each in config.get("proposers", ()) if isinstance(each, dict)):
            config.setdefault("datastore", str(home / STORE))
        if config.get("model") == "HEAD":  # a model that is not here: only our keys are checked
            parse_settings({key: config[key] for key in OWN_KEYS if key in config})
            config.clear()
    (home / "programs" / "read.py").write_text(READ_BY_VLLM)
    (home / "configs.json").write_text(json.dumps(configs))
    run([sys.executable, "programs/read.py", str(target_path())], home, PYTHONPATH="examples")
    for place, config, answer in zip(places, configs, json.loads((home / "answers.json").read_text()), strict=True):
        if any(each.get("on_device") for each in config.get("proposers", ()) if isinstance(each, dict)):
            assert "needs Model Runner V2" in answer, f"{place}: {answer}"  # the keys were understood
        else:
            assert not answer, f"{place}: {answer}"


# ---------------------------------------------------------------------------------------------------------------------
# With engines: one for the Python examples, one behind the quick start's server
# ---------------------------------------------------------------------------------------------------------------------

ONE_ENGINE = '''
"""Runs programs one after the other; those that ask for the same engine get the same one."""

import json
import sys

import vllm

original, engines = vllm.LLM, {}


def shared(model, **arguments):
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, **arguments}
    key = json.dumps([model, arguments], sort_keys=True)
    if key not in engines:
        engines[key] = original(model, **arguments)
    return engines[key]


if __name__ == "__main__":
    vllm.LLM = shared
    for path in sys.argv[1:]:
        with open(path) as file:
            exec(compile(file.read(), path, "exec"), {"__name__": "__main__"})
        print("ended well:", path)
    assert len(engines) == 1, list(engines)
'''


@pytest.mark.engine
def test_python_examples_with_an_engine(home: Path) -> None:
    wanted = [block for block in BLOCKS if "run with an engine" in block.marks]
    assert len(wanted) >= 3
    (home / "programs" / "all.py").write_text(ONE_ENGINE)
    names = []
    for number, block in enumerate(wanted):
        names.append(f"programs/example{number}.py")
        (home / names[-1]).write_text(for_real(block.code))
    printed = run([sys.executable, "programs/all.py", *names], home, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for name, block in zip(names, wanted, strict=True):
        assert f"ended well: {name}" in printed, block


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.engine
def test_the_quick_start_serves(home: Path) -> None:
    """The page's commands, with another port."""
    port = str(_free_port())
    mark = "run by tests/test_docs.py::test_the_quick_start_serves"
    steps = [block for block in BLOCKS if block.page == QUICK_START and mark in block.marks]
    serve, curl, python, top = (block.code.replace("8000", port) for block in steps)
    assert "specplug serve" in serve
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"{serve}"], cwd=home, env=environment(home), stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + START_TIMEOUT_S
            while b"Application startup complete" not in (home / "server.log").read_bytes():
                assert process.poll() is None, (home / "server.log").read_text()[-4000:]
                assert time.monotonic() < end, (home / "server.log").read_text()[-4000:]
                time.sleep(0.5)
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
            answer = json.loads(run(["bash", "-c", curl], home))
            assert answer["choices"][0]["text"]
            (home / "programs" / "example.py").write_text(python)
            assert answer["choices"][0]["text"].strip() == run([sys.executable, "programs/example.py"], home).strip()
            assert "suffix" in run(["bash", "-c", top], home)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group is the server's own session
            process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The site
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'not included in the "nav"' not in done.stderr, done.stderr
    return folder


class Fetched(HTMLParser):
    """Collects the addresses that a browser fetches when it opens a page; links are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.addresses.append(value or "")
            if name == "style":
                self.addresses += addresses_in_css(value or "")


def addresses_in_css(text: str) -> list[str]:
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def is_outside(address: str) -> bool:
    return bool(re.match(r"\s*(\w+:)?//", address)) and not address.startswith("data:")


def test_the_site_fetches_nothing_from_outside(site: Path) -> None:
    checked = 0
    for path in site.rglob("*"):
        if path.suffix in (".html", ".svg"):
            page = Fetched()
            page.feed(text := path.read_text())
            styles = "".join(re.findall(r"<style.*?>(.*?)</style>", text, re.S))
            addresses = [*page.addresses, *addresses_in_css(styles)]
        elif path.suffix == ".css":
            addresses = addresses_in_css(path.read_text())
        elif path.suffix == ".js":
            # Scripts can fetch anything: they may name no script, style, font or picture on another server.
            addresses = re.findall(r"https?://[^\s'\"`]+?\.(?:js|css|woff2?|png|svg)\b", path.read_text())
            addresses += re.findall(r"https?://(?:unpkg|cdn|cdnjs|fonts)\b[^\s'\"`]*", path.read_text())
            addresses = [each for each in addresses if not is_comment(path.read_text(), each)]
        else:
            continue
        checked += 1
        assert not [each for each in addresses if is_outside(each)], path
    assert checked > 40


def is_comment(script: str, address: str) -> bool:
    """Whether an address is only in comments of a script, such as its licence."""
    code = re.sub(r"/\*.*?\*/", "", script, flags=re.S)
    code = re.sub(r"(?m)^\s*//.*$", "", code)
    return address not in code


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ('<script src="https://example.org/x.js"></script>', True),
        ('<link rel="stylesheet" href="//example.org/x.css">', True),
        ('<p style="background: url(https://example.org/x.png)">', True),
        ('<a href="https://example.org">', False),
        ('<img src="data:image/png;base64,xx//yy">', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_what_is_fetched_is_seen(text: str, outside: bool) -> None:
    page = Fetched()
    page.feed(text)
    assert any(map(is_outside, page.addresses)) == outside


def test_the_reference_has_what_the_code_has(site: Path) -> None:
    configuration = (site / "reference" / "configuration.html").read_text()
    names = [*Settings.model_fields, *registry.PROPOSERS, *registry.PROPOSERS, files.FOLDER_VARIABLE]
    for name in (*names, "specplug_tenant", "max_history_bytes"):
        assert f"<code>{name}</code>" in configuration, name
    commands = (site / "reference" / "commands.html").read_text()
    for name in ("serve", "datastore build", "replay", "couple", "bench", "tune", "top", "audit", "demo"):
        assert f"specplug {name}" in commands
    for option in ("--max-memory", "--speculative-config", "--prompt-tokens", "--once"):
        assert f"<code>{option}</code>" in commands
    shown = (site / "metrics.html").read_text()
    for one in series.ALL_SERIES:
        assert f"<code>{one.name}{'_total' if one.kind == 'counter' else ''}</code>" in shown
    for path in site.rglob("*.html"):
        assert "<!-- generated" not in path.read_text(), path


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py."""
    specification = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_reference_needs_no_vllm() -> None:
    program = (
        "import importlib.util, sys\n"
        "sys.modules['vllm'] = None  # importing it is an error\n"
        "found = importlib.util.spec_from_file_location('hooks', 'docs/hooks.py')\n"
        "hooks = importlib.util.module_from_spec(found)\n"
        "found.loader.exec_module(hooks)\n"
        "arguments = {'refusals': ['V2'], 'page': ['CONTRIBUTING.md']}\n"
        "print(min(len(made(*arguments.get(name, []))) for name, made in hooks.GENERATORS.items()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_variable_that_nobody_described_ends_the_build(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(hooks.variables_read()) == set(hooks.ENVIRONMENT)
    monkeypatch.delitem(hooks.ENVIRONMENT, "NUMBA_CACHE_DIR")
    with pytest.raises(hooks.PluginError, match="NUMBA_CACHE_DIR"):
        hooks.environment()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("os.environ['A']", "A"),
        ("os.environ.get('A', '')", "A"),
        ("os.getenv('A')", "A"),
        ("'A' in os.environ", "A"),
        ("options.get('A')", None),
    ],
)
def test_environment_variables_are_found(hooks: ModuleType, source: str, name: str | None) -> None:
    keys = [key for node in ast.walk(ast.parse(source)) if (key := hooks._environment_key(node)) is not None]
    assert [key.value for key in keys] == ([] if name is None else [name])


def test_the_pictures_are_what_their_program_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs/pictures/draw.py"), str(tmp_path)], check=True, timeout=120)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs/pictures").glob("*.svg"))
    for name in drawn:
        assert (tmp_path / name).read_text() == (ROOT / "docs/pictures" / name).read_text(), name
