"""Makes a CSV file of paper abstracts that nobody wrote, for `simulations/presets/abstracts.toml`.

    python examples/paper_abstracts.py abstracts.csv
    fedistill simulate simulations/presets/abstracts.toml

Each abstract has some two hundred words. It begins with sentences that any paper could begin with; what tells its
field comes late, so that a model which reads the beginning alone learns little. Some abstracts have two fields,
written as field|field. Only the standard library is used, and the same seed gives the same file.
"""

import argparse
import csv
import random
from pathlib import Path

FIELDS = {
    "astronomy": (
        "galaxies|pulsars|exoplanets|supernovae|dwarf stars|the cosmic background",
        "a radio telescope|spectra of distant light|an orbiting observatory|a survey of the night sky",
        "redshift|luminosity|orbital period|stellar mass",
    ),
    "biology": (
        "cell membranes|gut bacteria|plant roots|immune cells|gene expression|folded proteins",
        "a microscope|sequencing of tissue samples|cultures of living cells|knock-out mice",
        "growth of the organism|mutation|enzyme activity|survival of the species",
    ),
    "chemistry": (
        "metal catalysts|polymers|organic solvents|reaction intermediates|battery electrolytes|crystals",
        "mass spectrometry|titration|a heated reactor|nuclear magnetic resonance",
        "yield of the reaction|oxidation|binding energy|acidity",
    ),
    "computing": (
        "compilers|neural networks|distributed databases|sorting algorithms|network protocols|file systems",
        "a cluster of servers|a software prototype|benchmarks on a processor|a formal proof of the program",
        "running time|memory use|latency|the number of bugs",
    ),
    "economics": (
        "labour markets|household savings|central banks|trade tariffs|auctions|housing prices",
        "a panel of firms|tax records|a survey of consumers|a natural experiment",
        "wages|inflation|demand|unemployment",
    ),
}
NEUTRAL = (
    "The question that this {work} takes up has been asked for {long}.",
    "Earlier {works} came to answers that do not agree, and the reasons are {poorly} understood.",
    "We set out what is known, and where the known {ends}.",
    "A careful comparison needs {more} than a single observation, and that is seldom available.",
    "Much depends on assumptions which are {rarely} stated.",
    "It has been argued that a {simple} explanation suffices; others see the need for a {rich} one.",
    "Our aim is {modest}: to state the question so that it can be answered, and to give a first answer.",
    "The {work} is organised in three parts, of which the second is the {main} one.",
    "Several groups have tried to repeat the best known result, with {mixed} success.",
    "We are careful to separate what was planned from what was found on the way.",
)
SPECIFIC = (
    "We study {subject} with {method}.",
    "Measured by {quantity}, {subject} behave in a way that nobody expected.",
    "With {method} we follow {subject} over time and record {quantity}.",
    "A change of {quantity} goes along with a change in {subject}.",
    "The effect on {quantity} stays when {method} is left out.",
    "We explain {quantity} by a model of {subject}.",
)
CLOSING = (
    "The result holds in every one of our checks.",
    "The {work} ends with what we could not settle.",
    "All material is available on request.",
    "We close with a list of open questions, the {main} one first.",
)
WORDS = {
    "work": "study|paper|article|report",
    "works": "studies|papers|attempts",
    "long": "decades|many years|a generation",
    "poorly": "poorly|hardly|not well",
    "ends": "ends|becomes uncertain|is disputed",
    "more": "more|far more|rather more",
    "rarely": "rarely|seldom|never quite",
    "simple": "simple|plain|single",
    "rich": "richer|more complete|longer",
    "modest": "modest|limited|practical",
    "main": "main|longest|most important",
    "mixed": "mixed|little|varying",
}
TWO_FIELDS = 0.2  # share of abstracts


def abstract(rng: random.Random, fields: list[str]) -> str:
    """About two hundred words, the neutral part first."""

    def filled(sentence: str, field: str) -> str:
        names = dict(zip(("subject", "method", "quantity"), FIELDS[field], strict=True)) | WORDS
        chosen = {name: rng.choice(given.split("|")) for name, given in names.items()}
        text = sentence.format(**chosen)
        return text[0].upper() + text[1:]

    opening = [filled(sentence, fields[0]) for sentence in rng.sample(NEUTRAL, 9)]
    middle = [filled(rng.choice(SPECIFIC), fields[number % len(fields)]) for number in range(rng.randint(4, 6))]
    closing = [filled(sentence, fields[0]) for sentence in rng.sample(CLOSING, 2)]
    return " ".join([*opening, *middle, *closing])


def write(path: Path, count: int, seed: int) -> None:
    """A CSV file with the columns ``abstract``, ``field`` and ``institute``, a possible owner."""
    rng = random.Random(seed)  # noqa: S311 (no secret)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("abstract", "field", "institute"))
        for _ in range(count):
            fields = sorted(rng.sample(sorted(FIELDS), 2 if rng.random() < TWO_FIELDS else 1))
            writer.writerow((abstract(rng, fields), "|".join(fields), f"institute {rng.randint(1, 4)}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a CSV file of invented paper abstracts.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("abstracts.csv"))
    parser.add_argument("--count", type=int, default=200, help="abstracts (200)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (0)")
    given = parser.parse_args()
    if given.count < 1:
        parser.error(f"--count {given.count}: give at least 1")
    if not given.path.parent.is_dir():
        parser.error(f"{given.path}: no such folder; make it first")
    write(given.path, given.count, given.seed)
    print(f"{given.path}: {given.count} abstracts of {len(FIELDS)} fields")
