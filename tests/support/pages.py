"""pages: the documentation, and the code that its pages show."""

import re
from pathlib import Path

from support.front_door import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md"), *REPOSITORY.glob("benchmarks/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """A page's fenced blocks in these languages, with their languages."""
    fenced = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for language, text in fenced if language in languages]
