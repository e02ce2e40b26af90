"""Every file that the documents name exists, and every document names what it should."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
PAGES = ("architecture", "networks", "scale", "data", "diffusers")
DOCUMENTS += [f"docs/{name}.md" for name in PAGES]
FILE = re.compile(r"`((?:fastcm|kernels|tests|benchmarks|docs|examples)/[\w./*]*)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_it_names_exist(document: str) -> None:
    named = FILE.findall((ROOT / document).read_text())
    assert named, f"{document} names no file: has the pattern aged?"
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/")))]
    assert not missing, f"{document} names {missing}"


def test_the_architecture_names_every_wing() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for entry in (ROOT / "fastcm").iterdir():
        if entry.suffix == ".py" and not entry.name.startswith("_"):
            assert entry.name in text, entry.name
        if entry.is_dir() and (entry / "__init__.py").exists() and entry.name != "kernels":
            assert re.search(rf"`(fastcm/)?{entry.name}/`", text), entry.name


def test_the_page_of_networks_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/networks.md").read_text(), re.S)
    scope: dict[str, Any] = {}
    exec(compile(block.replace(".fit(50)", ".fit(3)"), "networks.md", "exec"), scope)
    assert scope["x"].shape == (16, 2) and scope["x"].isfinite().all()
