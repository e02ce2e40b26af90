"""The documents of the repository as the tests read them: their blocks of code and commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
"""Every document, by its path in the repository."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in their order."""
    return re.findall(r"```python\n(.*?)```", text(page), flags=re.S)


def block(page: str, *parts: str) -> str:
    """The one Python block of a page that has all these parts."""
    (found,) = [b for b in blocks(page) if all(part in b for part in parts)]
    return found


def shortened(code: str) -> str:
    """The same code, trained for three steps wherever it trains for tens or more."""
    return re.sub(r"\.fit\(\d{2,}\)", ".fit(3)", code)


def commands(page: str) -> list[str]:
    """The command lines of a page that begin with ``fastcm``, without what follows a ``#``."""
    outside = re.sub(r"```python\n.*?```", "", text(page), flags=re.S)
    found = re.findall(r"^    (?:torchrun .*-m (?:-- )?)?(fastcm .*)$", outside, flags=re.M)
    inline = re.findall(r"`(fastcm [a-z][^`]*)`", outside)
    return [re.split(r"\s#", line)[0].replace("\n", " ").strip() for line in [*found, *inline]]
