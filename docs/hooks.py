"""Hooks of mkdocs: what the site shows of the code is read from the code when the site is built. Imports no vLLM.

A page asks for a piece with a line ``<!-- generated: NAME ARGUMENT -->``; what stands between it and a line
``<!-- end of generated -->``, if the page has one, is replaced (it is there for readers of the file itself). Pictures
become part of the page, so that they take its colours. Links that leave ``docs/`` get a copy of the file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomllib
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
COPIES = "files"
"""Folder of the site with copies of files that pages link to."""

GENERATED = re.compile(
    r"<!-- generated: (?P<name>[\w-]+)(?: (?P<argument>[^\n<>]+?))? -->"
    r"(?:(?:(?!<!-- generated:).)*?<!-- end of generated -->)?",
    re.S,
)
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
PICTURE = re.compile(r"^!\[(?P<text>[^\]]*)\]\((?P<path>[^)\s]+\.svg)\)$", re.M)

FETCHED_BY_THE_THEME = (
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js",
    "https://unpkg.com/resize-observer-polyfill",
)
"""Scripts that the theme's own script would fetch: for diagrams, of which we have none, and for browsers of 2019."""

ENVIRONMENT = {
    "SPECPLUG_METRICS_DIR": (
        "Folder in which workers leave their counters for `/metrics`. Set by the process that reads the configuration "
        "(a new temporary folder) and inherited; name a shared folder where workers run on other machines."
    ),
    "PROMETHEUS_MULTIPROC_DIR": (
        "prometheus_client's own, set by vLLM where several API servers answer: our series then join those that it "
        "collects from files."
    ),
    "NUMBA_CACHE_DIR": (
        "numba's own: where compiled code is kept. Set to a temporary folder where neither the installation nor the "
        "home can be written to."
    ),
    "SPECPLUG_METRICS_OWNER": (
        "Names the process that started a worker, which hands the worker's counters on to Ray's exporter. Set by the "
        "plugin and inherited."
    ),
    "VLLM_API_KEY": "vLLM's own: the server's key, which `POST /specplug/reload_stores` asks for as well.",
    "SPECPLUG_CACHE_DIR": (
        "Folder of a node for token stores that replicas on Ray fetch from the driver's node; by default "
        "`~/.cache/vllm-specplug/stores`."
    ),
    "SPECPLUG_END_WITH_PARENT": (
        "`1`: the processes of an engine end when the process that started it does, however that ends. Set for "
        "replicas on Ray."
    ),
    "RAY_USAGE_STATS_ENABLED": (
        "Ray's own: `specplug batch` and `ray-serve` set it to 0 for clusters that they start, unless it is set."
    ),
    "LD_PRELOAD": (
        "Read by `specplug demo`, `bench`, `tune` and `audit`: their engines get Intel's OpenMP (`libiomp5.so`, which "
        "comes with vLLM's CPU wheel) put in front, unless it is there already."
    ),
}
"""What each variable that the package reads is for; one that is missing or too many here ends the build."""


# ---------------------------------------------------------------------------------------------------------------------
# What mkdocs calls
# ---------------------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of ``docs/`` that pages link to."""
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(page.content_string):
            if (path := _outside(page.src_uri, found["target"])) is not None:
                uri = f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what is generated, then pictures and links."""
    uri = page.file.src_uri

    def filled(found: re.Match[str]) -> str:
        name, argument = found["name"], found["argument"]
        if name not in GENERATORS:
            raise PluginError(f"{uri}: nothing generates {name!r}; there are {', '.join(GENERATORS)}")
        made = GENERATORS[name](argument) if argument else GENERATORS[name]()
        return made.replace("](docs/", "](" + "../" * uri.count("/"))

    markdown = GENERATED.sub(filled, markdown)
    markdown = PICTURE.sub(
        lambda found: picture(config, posixpath.join(posixpath.dirname(uri), found["path"]), found["text"]), markdown
    )

    def inside(found: re.Match[str]) -> str:
        path = _outside(uri, found["target"])
        if path is None:
            return found[0]
        copy = f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
        return posixpath.relpath(copy, posixpath.dirname(uri) or ".") + (found["anchor"] or "")

    # GitHub wants a bar in a table escaped even where it is code; here it is shown as written.
    markdown = re.sub(r"`[^`\n]+`", lambda found: found[0].replace("\\|", "|"), markdown)
    return LINK.sub(inside, markdown)


def on_post_build(config: Any) -> None:
    """Leave nothing in the site that could be fetched from elsewhere."""
    for path in Path(config.site_dir, "assets", "javascripts").rglob("*.js"):
        text = path.read_text()
        for url in FETCHED_BY_THE_THEME:
            text = text.replace(url, "")
        path.write_text(text)
    # Maps of the theme's scripts to sources that are not here.
    for path in Path(config.site_dir, "assets").rglob("*.map"):
        path.unlink()


def _outside(uri: str, target: str) -> Path | None:
    """The file of the repository that a page links to and ``docs/`` does not have."""
    if not target.startswith("../"):
        return None
    path = (ROOT / "docs" / posixpath.dirname(uri) / target).resolve()
    return path if path.is_file() and ROOT in path.parents and ROOT / "docs" not in path.parents else None


def picture(config: Any, uri: str, text: str) -> str:
    """The picture's SVG, in the colour of the page's text instead of its own."""
    svg = (Path(config.docs_dir) / uri).read_text()
    svg = re.sub(r"<style>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"\s*\n\s*", " ", svg[svg.index("<svg") :])
    return f'<figure class="picture">{svg}<figcaption>{text}</figcaption></figure>'


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "&#124;") for cell in line) + " |" for line in lines
    )


def code(value: Any) -> str:
    """A value as JSON, in a code span."""
    return f"`{json.dumps(value)}`"


def prose(text: str) -> str:
    """A docstring's text in Markdown: its double backquotes and roles become code spans."""
    return re.sub(r":\w+:`~?([^`]+)`|``([^`]+)``", lambda found: f"`{found[1] or found[2]}`", text)


def named_paragraphs(text: str) -> dict[str, str]:
    """``name: text`` entries of a docstring; lines that are indented further belong to the entry before."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(text).splitlines():
        if (entry := re.match(r"(\w+): (.*)", line)) is not None:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" "):
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def attributes_of(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a class's docstring."""
    return named_paragraphs(inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2])


def docstring_after(module: Any, name: str) -> str:
    """The string that stands behind the assignment of a module's constant."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in itertools.pairwise(body):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return str(ast.literal_eval(following.value))  # type: ignore[attr-defined]
    raise PluginError(f"{module.__name__} has no {name} with a docstring behind it")


JSON_KINDS = {
    "num_speculative_tokens": "whole number",
    "proposers": "list",
    "datastore": "path, list of paths, or object of paths by name",
    "sampler": "name",
    "num_chains": "whole number",
    "proposer_deadline_s": "number",
    "scratch_blocks": "whole number",
}
"""What each key of ``speculative_config`` may be."""


def settings() -> str:
    """Keys of ``speculative_config``, from the model that checks them."""
    from vllm_specplug.settings.model import METHOD, Settings, parse_settings

    texts, defaults = attributes_of(Settings), parse_settings({}).to_dict()
    if differing := {*Settings.model_fields} ^ {*JSON_KINDS} | {*Settings.model_fields} - {*texts}:
        raise PluginError(
            f"docs/hooks.py: JSON_KINDS or the docstring of Settings lacks {', '.join(sorted(differing))}"
        )
    defaults["proposers"] = [entry["name"] for entry in defaults["proposers"]]
    rows = [["`method`", code(METHOD), "", "this plugin drafts and verifies"]]
    for name, field in Settings.model_fields.items():
        bounds = [
            f"{word} {getattr(each, key)}"
            for each in field.metadata
            for key, word in (("ge", "at least"), ("le", "at most"))
            if hasattr(each, key)
        ]
        kind = JSON_KINDS[name] + (f", {', '.join(bounds)}" if bounds else "")
        rows.append([f"`{name}`", kind, code(defaults[name]), prose(texts[name])])
    return table(["key", "value", "default", "meaning"], rows)


def proposers() -> str:
    """Every built-in proposer with its options, and the ensemble."""
    from vllm_specplug.settings import registry

    parts = []
    for name, target in {**registry.PROPOSERS, "ensemble": "vllm_specplug.proposers.ensemble.ensemble:"}.items():
        module = importlib.import_module(target.partition(":")[0])
        texts = named_paragraphs(docstring_after(module, "DEFAULT_OPTIONS"))
        options = dict(module.DEFAULT_OPTIONS)
        if missing := set(options) ^ set(texts):
            raise PluginError(
                f"{module.__name__}: DEFAULT_OPTIONS and its docstring differ in {', '.join(sorted(missing))}"
            )
        rows = [[f"`{option}`", code(value), prose(texts[option])] for option, value in options.items()]
        first = prose(" ".join(inspect.cleandoc(module.__doc__).split("\n\n")[0].split()))
        parts.append(f"### `{name}`\n\n{first}\n\n" + table(["option", "default", "meaning"], rows))
    return "\n\n".join(parts)


def request_options() -> str:
    """What a request may choose."""
    from vllm_specplug.settings.requests import REQUEST_OPTIONS

    return table(["option", "value"], [[f"`{name}`", text] for name, text in REQUEST_OPTIONS.items()])


def sources() -> Iterator[Path]:
    """Every Python file of the installed package."""
    for folder in ("vllm_specplug", "proposers", "samplers"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def variables_read() -> dict[str, set[str]]:
    """Environment variables that the package reads or sets, and the files that do."""
    found: dict[str, set[str]] = {}
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    of_module = {path: _constants(tree) for path, tree in trees.items()}
    of_all = {name: value for constants in of_module.values() for name, value in constants.items()}
    for path, tree in trees.items():
        for key in filter(None, map(_environment_key, ast.walk(tree))):
            if isinstance(key, ast.Constant):
                name = key.value
            elif (constant := key.attr if isinstance(key, ast.Attribute) else getattr(key, "id", "")).isupper():
                name = of_module[path].get(constant, of_all.get(constant))
            else:
                continue  # a name out of a table, which is shown as such
            if not isinstance(name, str):
                raise PluginError(f"{path}:{key.lineno}: cannot tell which environment variable is read")
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def _constants(tree: ast.Module) -> dict[str, str]:
    """Names that a module gives to strings."""
    return {
        target.id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _environment_key(node: ast.AST) -> ast.expr | None:
    """The name asked for by ``os.environ[...]``, ``os.environ.get(...)``, ``os.getenv(...)``, ``... in os.environ``."""

    def is_environ(each: ast.AST) -> bool:
        return isinstance(each, ast.Attribute) and each.attr == "environ"

    if isinstance(node, ast.Subscript) and is_environ(node.value):
        return node.slice
    if isinstance(node, ast.Compare) and is_environ(node.comparators[0]):
        return node.left
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        asks = node.func.attr in ("get", "pop", "setdefault") and is_environ(node.func.value)
        return node.args[0] if asks or node.func.attr == "getenv" else None
    return None


def environment() -> str:
    """Variables that the package reads, with what they are for."""
    found = variables_read()
    if differing := set(found) ^ set(ENVIRONMENT):
        raise PluginError(
            f"docs/hooks.py: ENVIRONMENT and what the package reads differ in {', '.join(sorted(differing))}"
        )
    rows = [
        [f"`{name}`", text, ", ".join(f"`{path}`" for path in sorted(found[name]))]
        for name, text in ENVIRONMENT.items()
    ]
    return table(["variable", "what for", "read in"], rows)


def engine_environment() -> str:
    """What the engines of our own commands are given where the user says nothing else."""
    from vllm_specplug.engines.environment import environment as given

    tree = ast.parse(inspect.getsource(given))
    (pairs,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict) and all(node.keys))
    return table(
        ["variable", "value"], [[f"`{name}`", f"`{value}`"] for name, value in ast.literal_eval(pairs).items()]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands and metrics
# ---------------------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every subcommand of ``specplug`` with its arguments and options."""
    import typer.main

    from vllm_specplug.cli import COMMANDS

    parts = []
    for name, (module, _) in COMMANDS.items():
        own: Any = typer.main.get_command(importlib.import_module(module).app)
        parts.append(f"## specplug {name}\n\n{_help(own)}")
        inner = getattr(own, "commands", None)
        if inner is None:
            parts.append(_parameters(name, own))
        for inner_name, each in (inner or {}).items():
            parts += [f"### specplug {name} {inner_name}\n\n{_help(each)}", _parameters(f"{name} {inner_name}", each)]
    return "\n\n".join(parts)


def _help(command: Any) -> str:
    text = inspect.cleandoc(command.help or "").replace("\b\n", "").replace("\f", "")
    # An example is code.
    return re.sub(r"(?m)^(Example: )?(specplug .+)$", lambda found: f"{found[1] or ''}`{found[2]}`", text)


def _parameters(usage: str, command: Any) -> str:
    passed_over = ("help", "install_completion", "show_completion")
    shown = [each for each in command.params if each.name not in passed_over and not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    line = " ".join(["specplug", usage, *(each.metavar or each.name.upper() for each in arguments)])
    options = [each for each in shown if each.param_type_name == "option"]
    parts = [f"Usage: `{line}{' [OPTIONS]' if options else ''}`"]
    rows = [[f"`{each.metavar or each.name.upper()}`", _default(each), each.help] for each in arguments if each.help]
    for each in options:
        names = ", ".join(f"`{name}`" for name in [*each.opts, *each.secondary_opts])
        rows.append([names, _default(each), each.help or ""])
    if rows:
        parts.append(table(["argument or option", "default", "meaning"], rows))
    return "\n\n".join(parts)


def _default(option: Any) -> str:
    if option.required:
        return "required" if option.param_type_name == "option" else ""
    default = option.default() if callable(option.default) else option.default
    if isinstance(option.show_default, str):
        return option.show_default
    if default is None or default is False or default in ((), [], ""):
        return ""
    if isinstance(default, (list, tuple)):
        return ", ".join(f"`{each}`" for each in default)
    return "on" if default is True else f"`{getattr(default, 'value', default)}`"


def metrics() -> str:
    """Every series."""
    from vllm_specplug.metrics.series import reference

    return reference()


# ---------------------------------------------------------------------------------------------------------------------
# Compatibility
# ---------------------------------------------------------------------------------------------------------------------


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def versions() -> str:
    """Versions that are supported, from where they are checked."""
    from vllm_specplug.hooks.seams import SUPPORTED_VLLM

    project = _project()
    rows = [
        ["Python", f"`{project['requires-python']}`", "`requires-python`"],
        ["vLLM", f"`{SUPPORTED_VLLM}`", "checked when vLLM loads the plugin"],
    ]
    rows += [
        [f"extra `{name}`", ", ".join(f"`{each}`" for each in wanted), "pip"]
        for name, wanted in project["optional-dependencies"].items()
        if name != "dev"
    ]
    return table(["what", "versions", "where that is said"], rows)


def native_methods() -> str:
    """vLLM's own drafters that our samplers verify."""
    from vllm_specplug.hooks.marks import NATIVE_METHODS

    return ", ".join(f"`{name}`" for name in NATIVE_METHODS)


def refusals(runner: str) -> str:
    """Why a coupled sampler refuses runner ``V1`` or ``V2``; what is filled in at run time is left open."""
    from vllm_specplug.hooks import fitness

    reasons = {"V1": fitness.UNFIT_V1, "V2": fitness.UNFIT_V2}[runner]
    return "\n".join("* " + re.sub(r"\{.*?\}", "…", reason.text) for reason in reasons)


def seam_count() -> str:
    """How many names of vLLM are held against their signatures."""
    from vllm_specplug.hooks import seam_list, seams

    groups = [
        value
        for value in vars(seam_list).values()
        if isinstance(value, tuple) and value and isinstance(value[0], seams.Seam)
    ]
    touched = {(seam.module, seam.name) for group in groups for seam in group}
    return str(sum(module.startswith("vllm.") for module, _ in touched))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of other files
# ---------------------------------------------------------------------------------------------------------------------


def demo() -> str:
    """The table of the demo, which stands in the README."""
    (table_of_demo,) = re.findall(r"```\n( +Same prompts, same seeds.*?)```", (ROOT / "README.md").read_text(), re.S)
    return f"```text\n{table_of_demo}```"


def page(name: str) -> str:
    """A page that lies beside the README, such as CHANGELOG.md, without its title. Its page here is changelog.md."""
    text = (ROOT / name).read_text().partition("\n")[2].strip()
    return re.sub(r"(?<=\]\()[A-Z]+\.md", lambda found: found[0].lower(), text)


GENERATORS: Mapping[str, Callable[..., str]] = {
    "settings": settings,
    "proposers": proposers,
    "request-options": request_options,
    "environment": environment,
    "engine-environment": engine_environment,
    "commands": commands,
    "metrics": metrics,
    "versions": versions,
    "native-methods": native_methods,
    "refusals": refusals,
    "seam-count": seam_count,
    "demo": demo,
    "page": page,
}
