"""The documents name what there is, their code and commands work, their site builds."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, blocks, commands, shortened, text

import fastcm

FILE = re.compile(r"`((?:fastcm|kernels|tests|benchmarks|docs|examples)/[\w./*]*)`")
NAMES_FILES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/data.md",
    "docs/networks.md",
    "docs/scale.md",
]
ALONE = ("README.md", "docs/tutorials/", "docs/export.md", "docs/diffusers.md")
"""Pages of whose code more is asked below, in tests/test_readme.py and test_example.py."""
WITH_CODE = [page for page in PAGES if blocks(page) and not page.startswith(ALONE)]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_it_names_exist(page: str) -> None:
    named = FILE.findall(text(page))
    assert named or page not in NAMES_FILES, f"{page} names no file: has the pattern aged?"
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing, f"{page} names {missing}"


def test_the_architecture_names_every_wing() -> None:
    page = text("docs/architecture.md")
    for entry in (ROOT / "fastcm").iterdir():
        if entry.suffix == ".py" and not entry.name.startswith("_"):
            assert entry.name in page, entry.name
        if entry.is_dir() and (entry / "__init__.py").exists() and entry.name != "kernels":
            assert re.search(rf"`(fastcm/)?{entry.name}/`", page), entry.name


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_in_its_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run(page)
    if page == "docs/index.md":
        assert scope["x"].shape == (1000, 2)
    if page == "docs/service.md":
        alone = scope["sampler"](4, seed=5)
        torch.testing.assert_close(scope["answers"][5], alone, rtol=1e-5, atol=1e-5)
    if page == "docs/networks.md":
        assert scope["x"].shape == (16, 2) and scope["x"].isfinite().all()
    if page == "docs/guidance.md":
        assert all(scope[name].isfinite().all() for name in "xyzu")


def run(page: str) -> dict[str, Any]:
    """What the blocks of a page leave behind, run one after another."""
    if "from diffusers" in text(page):
        pytest.importorskip("diffusers")
    scope: dict[str, Any] = {"__name__": "page"}
    for i, code in enumerate(blocks(page)):
        exec(compile(shortened(code), f"{page}, block {i + 1}", "exec", dont_inherit=True), scope)
    return scope


def test_the_tutorial_of_images_trains_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run("docs/tutorials/images.md")
    assert scope["data"].x.shape == (24, 3, 16, 16) and scope["data"].num_classes == 2
    assert len(scope["held_out"]) == 6 and scope["x"].shape == (16, 3, 16, 16)
    assert Path("samples.png").stat().st_size > 0 and scope["distance"] > 0
    again = fastcm.Sampler.from_run("runs/cd", steps=2)(16, seed=0, cond=scope["labels"])
    assert torch.equal(again, scope["x"])


def test_the_tutorial_of_distillation_keeps_the_teacher_and_moves_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run("docs/tutorials/distil.md")
    assert scope["before"].shape == scope["one"].shape == (64, 1, 8, 8)
    assert scope["samples"].shape == scope["x"].shape == (16, 1, 8, 8)
    taught = [p for p in scope["trainer"].ema_network(0).model.parameters()]
    for mine, theirs in zip(scope["model"].parameters(), taught, strict=True):
        assert torch.equal(mine, theirs)  # loaded back into diffusers
    assert any(
        not torch.equal(a, b)
        for a, b in zip(scope["student"].parameters(), scope["cd"].net.parameters())
    )


def test_the_tutorial_of_a_loop_learns_where_the_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run("docs/tutorials/loop.md")
    history = scope["history"]
    assert sum(history[-10:]) < 0.7 * sum(history[:10])
    assert scope["x"].shape == (100, 2) and scope["key"].step == 50
    assert isinstance(scope["Denoising"](), scope["Denoising"])


ABOUT_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", ABOUT_COMMANDS)
def test_its_commands_have_the_options_that_it_gives_them(page: str) -> None:
    typer = pytest.importorskip("typer")
    from fastcm.cli.app import app

    group = typer.main.get_command(app)
    for line in commands(page):
        words, command = line.split()[1:], group
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not group or not words or words[0].startswith("-"), line
        known = {name for option in command.params for name in option.opts} | {"--help"}
        given = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
        assert given <= known or takes_anything(command), f"{page}: {line}: {given - known}"


def takes_anything(command: Any) -> bool:
    return bool(command.context_settings.get("ignore_unknown_options"))


@pytest.mark.parametrize("page", PAGES)
def test_the_targets_of_make_that_it_names_are_there(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", text("Makefile"), flags=re.M))
    known = {name for line in targets for name in line.split()}
    for name in re.findall(r"(?:`|^    )make ([\w-]+)", text(page), flags=re.M):
        assert name in known, f"{page}: make {name}"


# --- the reference

WINGS = (
    *("adapters.diffusers", "data", "evaluation", "jvp", "networks", "objectives", "ops", "optim"),
    *("runs", "sampling", "training"),
)
PAGES_OF_API = [page for page in PAGES if page.startswith("docs/api/")]


def documented() -> set[str]:
    named = re.findall(r"^::: fastcm\.(\S+)", "\n".join(map(text, PAGES_OF_API)), flags=re.M)
    assert len(named) == len(set(named)), "a name stands twice in the reference"
    return set(named)


def exported(module: str) -> set[str]:
    """What a wing's page offers by ``from ... import X as X``, and functions defined there."""
    found = importlib.import_module(f"fastcm.{module}" if module else "fastcm")
    tree = ast.parse(Path(found.__file__ or "").read_text())
    names = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    names |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return {name for name in names if name and not name.startswith("_")}


def resolved(name: str) -> Any:
    """The object behind a name of the reference, with or without its short name."""
    module, rest = fastcm, name.split(".")
    found: Any = module
    for i, part in enumerate(rest):
        if not hasattr(found, part):
            importlib.import_module(".".join(["fastcm", *rest[: i + 1]]))
        found = getattr(found, part)
    return found


def test_every_public_name_is_in_the_reference() -> None:
    there = documented()
    objects = [resolved(name) for name in there]
    modules = [found for found in objects if inspect.ismodule(found)]
    within = [v for m in modules for k, v in vars(m).items() if not k.startswith("_")]
    wings = {importlib.import_module(f"fastcm.{wing}") for wing in WINGS}
    for wing in ("", *WINGS):
        for name in sorted(exported(wing)):
            full = f"{wing}.{name}" if wing else name
            found = resolved(full)
            same = any(found is other for other in (*objects, *within))
            covered = inspect.ismodule(found) and found in wings
            assert full in there or same or covered, f"docs/api/ lacks fastcm.{full}"


# --- errors

TROUBLE = "docs/troubleshooting.md"
SOURCES = sorted([*(ROOT / "fastcm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def spoken(node: ast.expr) -> str:
    """A message as the page quotes it: what is filled in is an ellipsis."""
    if isinstance(node, ast.JoinedStr):
        return "".join(spoken(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return spoken(node.left) + spoken(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@functools.cache
def messages() -> dict[str, list[str]]:
    """What each module of the package can say in an error or a warning, by its file."""
    found: dict[str, list[str]] = {}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if name != "warnings.warn" and (call is node or name == "AssertionError"):
                continue
            said = max(map(spoken, call.args), key=len)
            if said.strip("… "):
                found.setdefault(str(file.relative_to(ROOT)), []).append(said)
    return found


def quoted() -> list[str]:
    """The messages that the page quotes, in the first column of the tables under its headings."""
    _, *tables = text(TROUBLE).split("\n## ")
    rows = re.findall(r"^\| `([^`]+)` \| ", "\n".join(tables), flags=re.M)
    return [row.replace(r"\|", "|") for row in rows]


def matches(quote: str, message: str) -> bool:
    return quote.strip("… ") in message


def test_the_page_of_errors_quotes_messages_that_there_are() -> None:
    everything = [message for said in messages().values() for message in said]
    assert len(everything) > 300
    assert min(len(quote.strip("… ")) for quote in quoted()) > 3
    aged = [quote for quote in quoted() if not any(matches(quote, said) for said in everything)]
    assert not aged, f"{TROUBLE} quotes {aged}"


def test_the_errors_of_every_file_are_found_on_the_page() -> None:
    for file, said in messages().items():
        assert any(matches(quote, message) for quote in quoted() for message in said), (
            f"{TROUBLE} quotes no message of {file}: add a row, by symptom, for one of {said}"
        )


def exceptions() -> set[str]:
    """The classes of errors that the package defines."""
    found = set()
    for file in SOURCES:
        for node in ast.parse(file.read_text()).body:
            bases = [ast.unparse(b) for b in node.bases] if isinstance(node, ast.ClassDef) else []
            if any(base.endswith(("Error", "Exception")) for base in bases):
                found.add(node.name)  # type: ignore[union-attr]
    return found


def test_every_class_of_error_is_on_the_page() -> None:
    assert {"CheckpointError", "NonFiniteError", "PeerError"} <= exceptions()
    assert not {name for name in exceptions() if f"`{name}`" not in text(TROUBLE)}


# --- the site


def test_the_site_builds_without_warnings_and_asks_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    asset = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//")
    for page in pages:
        html = page.read_text()
        assert not asset.search(html), page
        assert 'class="mermaid"' not in html, f"{page} would load mermaid"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text()), sheet
