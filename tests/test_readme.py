"""What the README shows is what is there."""

import re
from pathlib import Path

import pytest

from promoe import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_notebook_example_is_the_file_that_the_suite_runs():
    code = (ROOT / "examples" / "notebook.py").read_text().split("\n", 1)[1].strip()
    assert f"```python\n{code}\n```" in README


def test_links_lead_somewhere():
    for page in [README, *(p.read_text() for p in (ROOT / "docs" / "decisions").glob("README.md"))]:
        folder = ROOT if page is README else ROOT / "docs" / "decisions"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page):
            assert (folder / target).exists(), target


@pytest.mark.parametrize("line", re.findall(r"^promoe (.+)$", README, re.M))
def test_commands_parse(line):
    cli.make_parser().parse_args(line.split("#")[0].split())  # leaves with SystemExit at an unknown option


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.M):
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.M), target
