"""The pages a newcomer walks through: links lead somewhere, every page is reached, named files are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "perf" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")
# A path in backquotes that starts at one of the repository's folders; a pattern may name several files.
NAMED = re.compile(r"(?<![\w/.])((?:umer1|tests|perf|docs|examples|kernels|csrc|docker|requirements)/[\w./*-]*\w)")


def links(page: Path) -> list[Path]:
    found = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    return [(page.parent / target).resolve() for target in found]


def test_links_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)} -> {target}" for page in PAGES for target in links(page) if not target.exists()
    ]
    assert not broken, "\n".join(broken)


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [target for target in links(page) if target.suffix == ".md"]
    assert reached >= set(PAGES), [str(page.relative_to(ROOT)) for page in set(PAGES) - reached]


def test_files_that_pages_name_are_there():
    absent = []
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            names = NAMED.findall(code)
            absent += [f"{page.relative_to(ROOT)}: {name}" for name in names if not list(ROOT.glob(name))]
    # mteb files results under a model's name, umer1/NAME
    assert [line for line in absent if line != "docs/sharing.md: umer1/NAME"] == []
