"""What README.md and docs/ say is there: links, keys, commands with their options, files, tests."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import click
import pytest
import typer.main

from common.config import default_keys, read_settings
from common.keys import STRATEGIES, DataKeys, ServerKeys
from simulations import cli
from simulations.audits import ATTACKS
from simulations.keys_page import configuration_page, every_key

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
KEYS = default_keys()
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
# of flwr run
FOREIGN = {"--run-config", "--federation-config", "--stream"}
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def test_the_configuration_page_is_that_of_the_model():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == configuration_page(), "run: fedistill keys --markdown > docs/configuration.md"


def test_every_key_says_what_it_means():
    assert [key.name for key in every_key()] == list(KEYS)
    assert all(key.meaning for key in every_key())


def test_a_key_says_its_choices_or_bounds():
    found = {key.name: key for key in every_key()}
    assert found["data.partition"].values.startswith("`auto`, `iid`, ")
    assert found["data.max-length"].values == "whole number from 8 up to 512"
    assert found["privacy.delta"].values == "number above 0 below 1"
    assert (found["data.multi-label"].default, found["data.multi-label"].values) == ("false", "`true`, `false`")


@every_page
def test_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    assert linked == {name for name in NAMES if name.startswith("docs/")}


@every_page
def test_keys_exist(page):
    for name in code(page):
        key = re.match(rf"((?:{'|'.join(SECTIONS)})\.[a-z][a-z0-9-]*)(?:$|[\s=,`/.])", name)
        if key and not re.match(r"[a-z.-]+\.(toml|json|jsonl|py|md|csv)\b", name):
            assert key[1] in KEYS, f"{name}: no such key"
    for command in commands(page):
        for key in read_settings(given(command, "-s")):
            assert key in KEYS or f"{key}: no such key" in page.read_text(), f"{key}: no such key"


@every_page
def test_commands_and_options_exist(page):
    for command in commands(page):
        check_command(command)
    options = {option for command in every_command() for parameter in command.params for option in parameter.opts}
    for name in code(page):
        for option in re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", name):
            if not name.startswith(("fedistill ", "python ", "flwr ", "pip ", "ray ")):
                assert option in options | FOREIGN, f"{option}: no command has it"


@every_page
def test_files_and_tests_exist(page):
    for name in [*code(page), *(word for block in blocks(page) for word in block.split())]:
        for path in re.findall(r"^(?:common|server|clients|simulations|tests|examples|docs)/[\w./-]*\w", name):
            assert (ROOT / path).exists(), f"{path}: no such file"


def test_the_page_of_algorithms_has_each_with_a_test():
    text = (ROOT / "docs" / "algorithms.md").read_text()
    wires, cuts = (
        get_args(part.model_fields[name].annotation) for part, name in ((ServerKeys, "wire"), (DataKeys, "partition"))
    )
    for name in {*STRATEGIES, *wires, *cuts, *ATTACKS} - {"auto", "utility"}:
        assert f"| `{name}`" in text, f"docs/algorithms.md has no row of {name}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith((" test |", " --- |"))]
    assert [row for row in rows if not re.search(r"`tests/[\w/]+\.py` \|$", row)] == []


def test_the_page_of_simulations_lists_every_command():
    text = (ROOT / "docs" / "simulation.md").read_text()
    for name in typer.main.get_command(cli.app).commands:
        assert f"\nfedistill {name} " in text, f"docs/simulation.md has no line of fedistill {name}"


@pytest.mark.parametrize(
    ("line", "check"),
    [
        ("[there](nowhere.md)", test_links_and_anchors_lead_somewhere),
        ("[there](#no-such-heading)", test_links_and_anchors_lead_somewhere),
        ("`server.cohorts`", test_keys_exist),
        ("`fedistill simulate -s rouns=3`", test_keys_exist),
        ("```\nfedistill simulated\n```", test_commands_and_options_exist),
        ("```\nfedistill export RUN --int4\n```", test_commands_and_options_exist),
        ("with `--int4`", test_commands_and_options_exist),
        ("`tests/common/test_none.py`", test_files_and_tests_exist),
    ],
)
def test_what_is_not_there_is_noticed(tmp_path, line, check):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{line}\n")
    with pytest.raises(AssertionError):
        check(page)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S)


def code(page: Path) -> list[str]:
    """What stands between backticks."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> Iterator[list[str]]:
    """Every `fedistill COMMAND ...` of a page, as words."""
    lines = (line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines())
    for line in [*lines, *code(page)]:
        found = re.match(r"(?:\$ )?fedistill (.*)", line.strip())
        if found:
            # a page writes [--option] for what may be left out
            yield shlex.split(re.sub(r"[\[\]]", " ", found[1]), comments=True)


def check_command(words: list[str]) -> None:
    command: click.Command = typer.main.get_command(cli.app)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        if re.fullmatch(r"[A-Z]+", name):  # fedistill COMMAND
            return
        for each in name.split("|"):
            assert each in command.commands or each == "...", f"{each}: no such command"
        command = command.commands[name.partition("|")[0]]
    if isinstance(command, click.Group):
        return
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in known, f"{command.name} has no {word}"


def given(words: list[str], option: str) -> list[str]:
    """The values given to an option, without those that only say what could stand there."""
    values = [value for name, value in pairwise(words) if name == option]
    return [value for value in values if "=" in value and not value.startswith("key=")]


def every_command(group: click.Command | None = None) -> Iterator[click.Command]:
    group = group or typer.main.get_command(cli.app)
    for command in group.commands.values() if isinstance(group, click.Group) else ():
        yield command
        yield from every_command(command)
