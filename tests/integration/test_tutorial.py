"""docs/tutorial.md, followed to the letter: its files written, its commands run in order, what it quotes compared."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
SCORE = r"[01]\.\d{4}"
CLOSE = 0.3  # processors round differently, and a few dozen texts are scored; who learns nothing has 0.5


def test_every_command_of_the_tutorial_does_what_it_says(tmp_path):
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = 0
    for kind, text in blocks(PAGE.read_text()):
        if kind in ("python", "toml"):
            write(tmp_path, text)
            continue
        for command, quoted in commands(text):
            ran = subprocess.run(
                ["bash", "-c", f"exec 2>&1; {command}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                text=True, timeout=900, check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"$ {command}\n{ran.stdout}"
            check_quoted(command, quoted, ran.stdout)
            done += 1
    assert done > 8


def test_a_quote_is_the_output_but_for_its_figures():
    said = "fine-tune: 3 of 9\naccuracy   0.9870   1.0000\n\nfolder  /tmp/x/first\n"
    check_quoted("c", ["accuracy  0.9500 5.0", "folder ..."], said)
    for wrong in (["accuracy"], ["folder ...", "accuracy 0.9870 1.0"], ["accuracy 0.8 1"], ["accuracy 0.6000 1.0"]):
        with pytest.raises(AssertionError):
            check_quoted("c", wrong, said)


def blocks(text: str) -> list[tuple[str, str]]:
    """(kind, what is in it) of the blocks that are files or commands."""
    return re.findall(r"^```(python|toml|console)\n(.*?)^```$", text, flags=re.M | re.S)


def write(folder: Path, text: str) -> None:
    """A file says its name in its first line."""
    name = re.match(r"# (\w+\.\w+)\n", text)
    assert name, f"the first line of a file is # NAME: {text.splitlines()[0]}"
    (folder / name[1]).write_text(text)


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block and the lines of output that are quoted below it."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        lines = part.replace("\\\n", "").splitlines()
        yield lines[0], [line for line in lines[1:] if line.strip()]


def check_quoted(command: str, quoted: list[str], said: str) -> None:
    """The quoted lines are in the output, in their order, word by word."""
    lines = iter(said.splitlines())
    for line in quoted:
        assert any(alike(line.split(), found.split()) for found in lines), f"$ {command}\nno line {line!r} in\n{said}"


def alike(quoted: list[str], found: list[str]) -> bool:
    """``...`` at the end of a quoted line stands for any words."""
    if quoted[-1] == "...":
        quoted, found = quoted[:-1], found[: len(quoted) - 1]
    return len(quoted) == len(found) and all(map(same, quoted, found))


def same(quoted: str, found: str) -> bool:
    """Scores are near, other numbers with a point are numbers, rulers have any length, words are themselves."""
    if re.fullmatch(SCORE, quoted):
        return bool(re.fullmatch(SCORE, found)) and abs(float(quoted) - float(found)) <= CLOSE
    if re.fullmatch(r"\d+\.\d+%?", quoted):
        return bool(re.fullmatch(r"[\d.]+%?", found))
    return quoted == found or set(quoted) == set(found) == {"─"}
