"""Published numbers are what the file says they are, and what does not fit in is refused."""

import json

import pytest
from runs import ROOT

from ieg_jax import methods
from ieg_jax.methods import describe, published

FOLDER = ROOT / "ieg_jax" / "methods"
GOOD = {"method": "elr", "dataset": "cifar10", "noise": "symmetric", "rate": 0.4, "top1": 89.15, "source": "here"}
SOURCES = {"here": {"text": "Somewhere", "url": "https://example.org", "of": ["elr"]}}


def test_every_row_and_every_source_is_read_and_used():
    sources, rows = published.load()
    text = json.loads((FOLDER / "published.json").read_text())
    printed = [row for row in rows if row.source != "ieg"]
    assert len(printed) == len(text["rows"]) and sources.keys() == text["sources"].keys()
    assert {row.source for row in rows} == sources.keys()
    for row in printed:
        kept = {key: value for key, value in vars(row).items() if value is not None}
        assert kept in text["rows"]


def test_the_tables_of_the_paper_come_from_its_own_file():
    _, rows = published.load()
    own = {(row.method, *row.setting, row.network, row.trusted): row for row in rows if row.source == "ieg"}
    row = own["ieg", "cifar10", "symmetric", 0.8, "wrn28_10", 100]
    assert (row.top1, row.std) == (93.7, 0.5)
    assert own["eg", "cifar100", "symmetric", 0.8, "wrn28_2", 1000].top1 == 57.6
    assert published.first("ieg", ("cifar10", "asymmetric", 0.4)).top1 == 94.9, "the larger network stands for it"
    # Tables 1, 2, 3 and 6, less rates of 0 and what Table 6 repeats of IEG.
    taken = [r for r in published.paper_rows() if r["table"] in "1236" and r["ratio"]]
    assert len(own) == len(taken) - 2


def test_a_number_of_the_own_authors_stands_for_a_method():
    assert published.first("co_teaching", ("cifar10", "symmetric", 0.2)).source == "co_teaching"
    assert published.first("co_teaching", ("cifar10", "symmetric", 0.8)).source == "incv"
    assert published.first("co_teaching", ("cifar10", "symmetric", 0.9)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"method": "elr++"}, {"dataset": "mnist"}, {"noise": "worse"}, {"dataset": "cifar100", "noise": "asymmetric"},
        {"dataset": "cifar10n", "noise": "worse"}, {"rate": None}, {"rate": 40}, {"top1": 0.0}, {"top1": 8915.0},
        {"std": -0.1}, {"epoch": "first"}, {"flips": "all"}, {"noise": "asymmetric", "flips": "any"},
        {"trusted": 0}, {"source": "there"}, {"accuracy": 89.15},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change):
    published.parse(SOURCES, [GOOD])
    with pytest.raises(ValueError, match="published numbers: "):
        published.parse(SOURCES, [GOOD | change])


def test_a_row_that_is_there_twice_is_refused():
    published.parse(SOURCES, [GOOD, GOOD | {"epoch": "best"}, GOOD | {"variant": "cosine schedule"}])
    with pytest.raises(ValueError, match="there twice"):
        published.parse(SOURCES, [GOOD, GOOD | {"top1": 90.0}])


@pytest.mark.parametrize("change", [{"url": "http://example.org"}, {"text": ""}, {"of": ["elr++"]}])
def test_a_source_that_does_not_fit_is_refused(change):
    with pytest.raises(ValueError, match="published numbers: source here"):
        published.parse({"here": SOURCES["here"] | change}, [GOOD])


def test_the_page_names_who_printed_a_number(monkeypatch):
    sources = SOURCES | {"there": {"text": "Elsewhere", "url": "https://example.com", "of": []}}
    human = {"method": "elr", "dataset": "cifar10n", "noise": "worse", "top1": 83.6, "epoch": "best", "source": "there"}
    monkeypatch.setattr(published, "load", lambda: published.parse(sources, [GOOD | {"std": 0.17}, human]))
    assert describe.published_lines("elr") == [
        "- Published, CIFAR-10 [1]: symmetric 0.4: 89.15 ± 0.17.",
        "- Published, CIFAR-10N [2]*: worse: 83.6 (best epoch).",
    ]
    section = describe.published_section()
    assert "| `elr` |  | 89.15 [1] |  |  |  |  |  |  | 83.6 b [2]* |" in section
    assert "2. Elsewhere: <https://example.com>" in section and "`ieg`" in section.partition("No number")[2]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("supervised", 0),
        ("elr", 4 * 10),  # t
        ("elr_plus", 2 * 4 * 10),  # t of each network
        ("sop", 4 * 1 + 4 * 10),  # u, v
        ("promix", 2 * 1),  # whose loss is small, a byte for each network
        ("rog", 0),  # a classifier, which has no rows
        ("ssr_plus", 4),  # a label; two heads, which have no rows
    ],
)
def test_bytes_per_example(name, expected):
    assert describe.bytes_per_example(methods.get(name)) == expected
