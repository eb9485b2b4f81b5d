"""The documentation speaks of files and options that exist."""

import re
from pathlib import Path

import pytest

from shardwright import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("model_defs", "compiler", "runtime", "shardwright", "tests", "scripts", "docs", "demo")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]+)`", text)
    # Files that a reader would write.
    examples = {"model_defs/granite.py", "model_defs/NAME.py"}
    missing = [p for p in paths if not list(ROOT.glob(p)) and p not in examples]
    assert missing == []


def test_every_option_of_a_command_in_the_readme_exists():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    known = {o for c in cli.cli.commands.values() for p in c.params for o in p.opts}
    used = {
        option
        for line in re.findall(r"^ {4}(?:\$ \S*)?shardwright .*|^\| `--.*", text, re.M)
        for option in re.findall(r"(?<![\w-])--[\w-]+", line)
    }
    assert len(used) > 10
    assert used - known == set()
