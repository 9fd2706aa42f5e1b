"""The report says what the run folder holds, to everybody, and asks nobody for anything."""

import json
import re
from html.parser import HTMLParser

import pytest

from common.errors import InputError
from server.report import write_report
from server.report.keys import configuration
from server.report.page import POLICY, STYLE, Figure, Section, page
from server.report.plots import canvas, short, svg, theme
from server.report.read import read_run
from server.report.rounds import tiers
from tests.run_folders import make_run

HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&amp; $x$ $"""
EMPTY = {"meta", "br", "img", "link", "input", "hr", "use", "path", "image"}


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in dict.fromkeys(self._open):
            self.texts[tag][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder):
    return Page(write_report(folder).read_text())


def sections(found):
    """Text by heading."""
    return dict(zip(found.texts["h2"], found.texts["section"], strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), faults=True)


@pytest.fixture(scope="module")
def finished(run):
    return read(run)


def test_the_verdict_comes_first(finished):
    """0.6 of the teacher's 0.8 is 75 %, 0.65 of 0.9 is 72.2 %; 6,300 bytes up and 9,000 down are 15.3 kB."""
    verdict = next(text for text in finished.texts["p"])
    assert verdict == (
        "Completed, after 3 rounds. The student keeps 75.0 % of its teacher's accuracy on text that stayed with 4 "
        "clients (0.6000 against 0.8000) and keeps 72.2 % of its teacher's accuracy on public validation (0.6500 "
        "against 0.9000)."
    )
    facts = " ".join(finished.texts["dl"])
    for said in (
        "40.0 %", "400 of 1,000 parameters", "Examples per second50", "15.3 kB", "9 kB to the clients", "no epsilon",
        "Answers lost21 failed, 1 late and 1 lost at first and asked again",
    ):  # fmt: skip
        assert said in facts, said


def test_every_part_has_its_heading_in_order(finished):
    assert [name for name in ("h1", "h2", "h3") if finished.texts.get(name)] == ["h1", "h2"]
    assert len(finished.texts["h1"]) == 1
    assert finished.texts["h2"] == [
        "Score per round", "Teacher and student", "Loss and its parts", "The student's shape", "The clients' shards",
        "Time by phase and worker", "Bytes per round", "Faults", "Configuration", "Versions",
    ]  # fmt: skip


def test_who_does_not_see_a_figure_is_told_what_it_shows(finished):
    """Each plot has its finding as its name, and its numbers in a table with a caption and named rows and columns."""
    plots = [each for each in finished.of("div") if each.get("class") == "plot"]
    assert len(plots) == len(finished.of("svg")) == len(finished.of("figure")) == 8
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 30 for plot in plots)
    assert len(finished.of("details")) == 8 + 1  # and all keys
    assert len(finished.of("caption")) == len(finished.of("table"))
    assert {each.get("scope") for each in finished.of("th")} == {"row", "col"}
    assert finished.of("html")[0]["lang"] == "en"


def test_findings_are_those_of_the_journals(finished):
    found = sections(finished)
    assert "accuracy on the clients' held-out text is 0.6000 after round 3" in found["Score per round"]
    assert "standard deviation of 0.1000" in found["Score per round"]
    assert "loss 0.3333 (at first 1.0000)" in found["Loss and its parts"]
    assert "hidden" not in found["Loss and its parts"]  # a part that is never there
    assert (
        "Of 10.5 s that were spent with the clients, teach 3.0 s, train 6.0 s and evaluate 1.5 s."
        in found["Time by phase and worker"]
    )
    assert (
        "for 70.0 % of the time that training took; the idlest for 50.0 %, the busiest for 90.0 %"
        in found["Time by phase and worker"]
    )
    assert "9 kB to the clients and 6.3 kB from them, about 5.1 kB a round" in found["Bytes per round"]
    assert (
        "2 of 4 layers (0, 3), in each of them 1 of 2 heads and 16 of 32 neurons, and 50 of 60 word pieces in an "
        "embedding of rank 4: 400 of 1,000 parameters, 40.0 %" in found["The student's shape"]
    )


def test_keys_that_are_not_the_default_come_first(tmp_path):
    keys = configuration(read_run(make_run(tmp_path, client__lr=0.5)))
    first, every = Page(page("t", "v", (), [keys])).texts["section"][0].split("All ")
    assert "client.lr0.50.0003" in first
    assert "distill.temperature" not in first
    assert "distill.temperature2.0" in every


def test_a_run_that_was_killed_tells_what_it_wrote(tmp_path):
    """Without a summary: its journals' sums, and no claim about what is told at the end."""
    found = read(make_run(tmp_path, killed=True, faults=True))
    assert found.texts["p"][0].startswith("Not finished: the run was killed, or goes on, after 3 rounds.")
    assert "keeps 75.0 % of its teacher's accuracy on text that stayed with 4 clients" in found.texts["p"][0]
    facts = " ".join(found.texts["dl"])
    assert "15.3 kB" in facts and "Examples per second50" in facts and "1 failed, 1 late" in facts
    parts = sections(found)
    assert "it is told when a run ends" in facts
    assert "is told when a run ends" in parts["The student's shape"]
    assert len(found.of("svg")) == 7


def test_a_score_of_an_earlier_round_is_told_with_its_round(tmp_path):
    """As of a run that is scored seldom, or was killed between training and scoring."""
    make_run(tmp_path, killed=True)
    journal = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()[:-1]]
    kept = [line for line in lines if line["phase"] == "train" or line["round"] < 3]
    journal.write_text("".join(json.dumps(line) + "\n" for line in kept))
    said = read(tmp_path).texts["p"][0]
    assert "goes on, after 3 rounds." in said
    assert "on text that stayed with 4 clients as scored after round 2 (0.5667 against" in said
    assert "0.6167 on public validation as scored after round 2." in said
    journal.write_text(
        "".join(json.dumps(line) + "\n" for line in kept if line["phase"] == "train" or not line["round"])
    )
    assert "on public validation as scored before round 1." in read(tmp_path).texts["p"][0]


@pytest.mark.parametrize("hidden", [{"privacy__unit": "client"}, {"privacy__secure_aggregation": True}])
def test_who_was_lost_is_not_made_up_where_the_journals_do_not_tell(tmp_path, hidden):
    found = read(make_run(tmp_path, killed=True, **hidden))
    assert "Answers lostnot known" in " ".join(found.texts["dl"])
    assert "Who was lost is told when a run ends." in sections(found)["Faults"]


def test_how_many_clients_scored_is_not_made_up_where_the_journals_do_not_tell(tmp_path):
    make_run(tmp_path, privacy__unit="client", privacy__noise_multiplier=1.0, clients=50, server__cohort=2)
    journal = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps({**line, "clients": None}) + "\n" for line in lines))
    assert "accuracy on text that stayed with the clients (" in read(tmp_path).texts["p"][0]


def test_a_student_of_another_model_is_not_told_as_a_part_of_its_teacher(tmp_path):
    run = make_run(tmp_path, student__model="other")
    (run / "slim").mkdir()
    (run / "slim" / "shape.json").write_text(json.dumps({"layers": [0, 3], "heads": [[7], [9]]}))
    said = sections(read(run))["The student's shape"]
    assert "The student has 2 layers with 1 heads each, 16 neurons in each, and 50 word pieces" in said
    assert "of 4 layers" not in said
    assert read_run(run).kept["heads"] == [[7], [9]]


def test_shards_of_several_labels_are_as_large_as_they_have_texts(tmp_path):
    run = make_run(tmp_path, clients=2)
    found = {"classes": ["a", "b"], "counts": [[10, 10], [0, 0]], "sizes": [10, 4]}
    (run / "shards.json").write_text(json.dumps(found))
    said = sections(read(run))["The clients' shards"]
    assert "2 clients hold 14 private examples, 4 to 10 each" in said
    assert "one label alone" not in said and "left out" not in said


def test_what_a_run_resolves_by_itself_is_not_told_as_given(tmp_path):
    keys = configuration(read_run(make_run(tmp_path, rounds=5, clients=10)))
    first = Page(page("t", "v", (), [keys])).texts["section"][0].split("All ")[0]
    for key in ("data.partition", "server.lr", "server.packing", "server.wire"):
        assert key not in first
    keys = configuration(read_run(make_run(tmp_path, server__wire="fp16", server__lr=0.5)))
    first = Page(page("t", "v", (), [keys])).texts["section"][0].split("All ")[0]
    assert "server.lr0.51.0" in first and 'server.wire"fp16""fp32"' in first


def test_a_run_that_was_killed_before_its_first_score_has_a_report(tmp_path):
    make_run(tmp_path, killed=True)
    for name in ("metrics.jsonl", "costs.jsonl", "shards.json"):
        (tmp_path / name).unlink()
    found = read(tmp_path)
    assert "Nothing was scored yet" in found.texts["p"][0]
    assert "Configuration" in found.texts["h2"]


def test_a_run_whose_only_scores_are_empty_has_a_report(tmp_path):
    """As one without a validation split has before its first round."""
    make_run(tmp_path, killed=True)
    empty = {"round": 0, "phase": "validation", "student": {}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(empty) + "\n")
    assert "Nothing was scored yet" in read(tmp_path).texts["p"][0]


@pytest.mark.parametrize("end", [b"[]\n", b"7\n", b'{"round": 4}\n', b'{"round": "4", "phase": "a"}\n', b"\xff\xfe\n"])
def test_a_journal_ends_before_a_line_that_is_none(tmp_path, end):
    make_run(tmp_path)
    before = read(tmp_path).texts["section"]
    for name in ("metrics.jsonl", "costs.jsonl"):
        with (tmp_path / name).open("ab") as stream:
            stream.write(end)
    assert read(tmp_path).texts["section"] == before


def test_a_summary_that_is_none_is_named(tmp_path):
    make_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("status", "rounds", "teacher", "student", "retention", "cost", "faults"):
        for damaged in ({key: value for key, value in summary.items() if key != name}, summary | {name: None}):
            (tmp_path / "summary.json").write_text(json.dumps(damaged))
            with pytest.raises(InputError, match=f"summary.json: {name} = null: damaged, or of another version"):
                write_report(tmp_path)


def test_tiers_have_curves_and_a_table(tmp_path):
    with theme():
        found = Page(page("t", "v", (), [tiers(read_run(make_run(tmp_path, tiers=True)))])).texts["section"][0]
    assert "1/1/8 0.6000, 2/2/16 0.6000" in found
    assert "1/1/825000.80000.600075.0 %0.6000" in found


def test_what_is_private_is_said_to_be(tmp_path):
    make_run(tmp_path, privacy__unit="client", privacy__noise_multiplier=1.0, server__cohort=2)
    (tmp_path / "shards.json").unlink()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = ("round", "phase", "student", "teacher", "retention")
    lines = [{name: line[name] for name in kept if name in line} for line in lines if line["phase"] != "teach"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["privacy"] = {"unit": "client", "epsilon": 3.14159, "delta": 1e-5, "note": "holds for students"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = read(tmp_path)
    assert "epsilon 3.14for one client, delta 1e-05" in " ".join(found.texts["dl"])
    parts = sections(found)
    assert "this run protects its clients" in parts["The clients' shards"]
    assert "No losses are told" in parts["Loss and its parts"]
    assert "not told in this run" in parts["Score per round"]
    assert "holds for students" in parts["Teacher and student"]


def test_masked_sums_tell_a_mean_and_a_deviation_of_clients_alone(tmp_path):
    folder = make_run(tmp_path / "run")
    journal = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.get("spread", {}).pop("worst_decile", None)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = sections(read(folder))["Score per round"]
    assert "Clients differ by a standard deviation of 0.1000." in said
    assert "worst tenth of" not in said


def test_an_epsilon_of_another_federation_is_no_figure_of_this_one(tmp_path):
    make_run(tmp_path, privacy__unit="client", privacy__noise_multiplier=1.0, server__cohort=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["privacy"] = {"unit": "client", "epsilon": 3.14159, "delta": 1e-5, "noise_cohort": 1000}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    facts = " ".join(read(tmp_path).texts["dl"])
    assert "Privacysimulatedepsilon 3.14 for one client, delta 1e-05 is that of 1,000 clients a round" in facts


def test_thousands_of_clients_and_a_hundred_rounds_stay_readable(tmp_path):
    classes = [f"class {number}" for number in range(150)]
    make_run(tmp_path, rounds=100, clients=5000, classes=classes)
    found = read(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    text = sections(found)["The clients' shards"]
    assert "48 of 4,999 clients are drawn" in text
    assert "The 20 commonest of 150 labels are drawn" in text
    assert len(re.findall(r"client \d+", text)) == 48


def test_the_page_asks_nobody_for_anything(finished):
    """No element that fetches, no script, no address outside; and a policy that would forbid it."""
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in finished.of("meta")
    assert POLICY.startswith("default-src 'none'; style-src 'unsafe-inline'")
    names = {name for name, _ in finished.elements}
    assert not names & {"script", "link", "img", "image", "iframe", "object", "embed", "form", "a", "base", "audio"}
    for _, attributes in finished.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert all(value.startswith("#") for name, value in attributes.items() if name in ("href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", STYLE)


def test_ids_are_the_figures_own(finished):
    ids = [attributes["id"] for _, attributes in finished.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    used = {each["href"][1:] for each in finished.of("use")}
    assert used and used <= set(ids)


def test_nothing_that_goes_in_becomes_markup(tmp_path):
    run = make_run(tmp_path / "a<b>&'\"", data__source=HOSTILE, classes=(HOSTILE, "<b>$1$</b>\x00\n"), tiers=True)
    summary = json.loads((run / "summary.json").read_text())
    summary["versions"][HOSTILE] = summary["student_sha256"] = summary["status"] = summary["task"] = HOSTILE
    summary["privacy"] |= {"unit": "example", "delta": 1e-5, "note": HOSTILE}
    summary["metric"] = HOSTILE
    for who in ("teacher", "student"):
        for place in ("federated", "validation"):
            summary[who][place] = {HOSTILE: 0.5, "n": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    text = (run / "metrics.jsonl").read_text().replace('"accuracy"', json.dumps(HOSTILE))
    (run / "metrics.jsonl").write_text(text.replace("soft_loss", "<i>x_loss"))
    costs = (run / "costs.jsonl").read_text().replace('"teach"', json.dumps(HOSTILE))
    (run / "costs.jsonl").write_text(costs)
    found = read(run)
    assert not found.of("script") and not found.of("img") and not found.of("b") and not found.of("i")
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in found.texts["h1"][0]


def test_the_same_folder_gives_the_same_page(finished, run):
    before = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: no run there"):
        write_report(tmp_path)


def test_a_plot_takes_the_pages_colours_and_fonts(tmp_path):
    with theme():
        figure, axes = canvas(2.0)
        axes.plot([1, 2], [3, 4], label="$a$ < b")
        axes.legend()
        drawn = svg(figure, "one")
    assert "$a$ &lt; b" in drawn
    assert "DejaVu" not in drawn and "system-ui" in drawn
    assert "var(--ink)" in drawn and "#010101" not in drawn
    assert re.findall(r' id="(?!one-)', drawn) == []
    assert "width=" not in drawn.split(">")[0]


def test_names_in_plots_are_short_and_on_one_line():
    assert short("a\nb\x00") == "a b"
    assert short("x" * 40) == "x" * 17 + "…"


def test_colours_can_be_told_from_the_ground_in_light_and_dark():
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    )
    for colours in (light, dark):
        for ground in ("paper", "card"):
            assert all(contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "soft"))
            assert all(contrast(colours[f"c{number}"], colours[ground]) >= 3.0 for number in range(1, 7))


def contrast(one, other):
    above, below = sorted((luminance(one), luminance(other)), reverse=True)
    return (above + 0.05) / (below + 0.05)


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_figure_that_is_not_drawn_is_a_sentence():
    found = Page(page("t", "v", (), [Section("s", [Figure("", "nothing was lost")])]))
    assert not found.of("figure")
    assert found.texts["p"] == ["v", "nothing was lost"]
