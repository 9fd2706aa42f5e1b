"""A user's file reads the same from every format, and what is wrong with it is named without quoting it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import InputError
from common.files import read_columns, read_public

PRIVATE = "Xaverl Zwockt Krebs"


def values(path):
    return {name: column() for name, column in read_columns(path).items()}


def refusal(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_columns(path)
    message = str(caught.value)
    assert str(path) in message
    assert not any(word in message for word in PRIVATE.split())
    return message.removeprefix(str(path))


def test_csv_values_are_text_as_they_stand(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\r\nNA,007\r\n"a, b\nc","say ""x"""\r\n\r\n 1.0 ,\r\n')
    assert values(path) == {"text": ["NA", "a, b\nc", " 1.0 "], "label": ["007", 'say "x"', ""]}


def test_json_lines_and_a_json_array_read_alike(tmp_path):
    rows = [{"text": "2020-01-01", "label": 1}, {"text": "null", "more": None}, {"label": 2.5, "text": ["x"]}]
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    array.write_text("\n" + json.dumps(rows, indent=1))
    expected = {"text": ["2020-01-01", "null", ["x"]], "label": [1, None, 2.5], "more": [None, None, None]}
    assert values(lines) == expected
    assert values(array) == expected


def test_parquet_files_follow_one_another(tmp_path):
    folder = tmp_path / "label=9"  # a folder named like a column is no column
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"text": [f"a{number}"], "label": [number]}), folder / f"{number}.parquet")
    both = read_public([folder / "0.parquet", folder / "1.parquet"])
    assert {name: column() for name, column in both.items()} == {"text": ["a0", "a1"], "label": [0, 1]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path = tmp_path / name
    path.write_text("text\nx\n" if name == "a.csv" else '{"text": "x"}', encoding="utf-8-sig")
    assert values(path) == {"text": ["x"]}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    assert refusal(tmp_path / name, b"") == ": the file is empty"


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    assert refusal(tmp_path / "a.xlsx", b"x") == ": unknown kind '.xlsx'; give one of .csv, .jsonl, .json, .parquet"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, name):
    content = f'text\n"{PRIVATE}"\n'.encode() + "größer".encode("latin-1")
    assert refusal(tmp_path / name, content) == ": line 3, byte 3 is not UTF-8; save it as UTF-8"


@pytest.mark.parametrize(
    "content, line",
    [
        (f"text,label\nfine,0\n{PRIVATE}, and more,1\n", 3),
        (f"text,label\n{PRIVATE}\n", 2),
        (f'text,label\nfine,0\n"{PRIVATE},1\nnever closed,0\n', 4),
        (f'text,label\n"{PRIVATE}" x,1\n', 2),
    ],
)
def test_a_broken_csv_line_is_named(tmp_path, content, line):
    assert refusal(tmp_path / "a.csv", content).startswith(f": line {line}: ")


def test_two_columns_of_one_name_are_refused(tmp_path):
    assert "same name" in refusal(tmp_path / "a.csv", f"text,text\n{PRIVATE},x\n")


@pytest.mark.parametrize("broken", ['{"text": Xaverl Zwockt Krebs}', "[" * 100_000, '{"text": "Krebs'])
def test_a_line_that_is_no_json_is_named(tmp_path, broken):
    assert refusal(tmp_path / "a.jsonl", '{"text": "x"}\n\n' + broken).startswith(": line 3 ")


def test_an_entry_without_columns_is_named(tmp_path):
    assert refusal(tmp_path / "a.jsonl", f'{{"text": "x"}}\n"{PRIVATE}"').startswith(": row 2 ")
    assert refusal(tmp_path / "a.json", f'[{{"text": "x"}}, ["{PRIVATE}"]]').startswith(": row 2 ")


def test_bytes_that_are_no_parquet_are_refused(tmp_path, capfd):
    assert refusal(tmp_path / "a.parquet", b"PAR1" + PRIVATE.encode()).startswith(": cannot be read as parquet")
    assert "Krebs" not in "".join(capfd.readouterr())
