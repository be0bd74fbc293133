"""The report of the benchmark: what it makes of samples, its file, its table, its comparison; and a tiny network."""

import copy
import json
import statistics

import pytest
from rich.console import Console

from benchmarks.bench import __main__ as command
from benchmarks.bench import children, measure, options, peers, programs, report, steps
from configs import default
from ieg_jax.errors import UserError

ROWS = {
    "step/N/supervised": {
        "unit": "s", "samples": [1.0, 2.0, 4.0], "others": [0.0, 1.0, 0.5], "gflop": 10.0, "passes": 3.0, "mib": 7.0,
        "base": "step/N/supervised",
    },
    "step/N/ieg": {
        "unit": "s", "samples": [8.0, 14.0, 20.0], "others": [0.0, None, 0.1], "gflop": 73.0, "passes": 22.0,
        "mib": 30.0, "base": "step/N/supervised",
    },
    "step/N/ieg, torch": {
        "unit": "s", "samples": [4.0, 7.0, 40.0], "others": [0.2, 0.2, 0.2], "base": "step/N/ieg", "version": "9.9",
    },
    "predict/N": {"unit": "images/s", "samples": [123.456789]},
}  # fmt: skip


def made(rows=ROWS, notes=()):
    return report.make(copy.deepcopy(rows), {"steps": 1.23}, list(notes), {"rounds": 3})


def printed(table):
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_medians_quartiles_and_what_it_was_measured_on():
    found = made()
    row = found["rows"]["step/N/supervised"]
    assert row["median"] == 2.0 and row["quartiles"] == [1.5, 3.0]
    assert found["rows"]["predict/N"]["samples"] == [123.46]
    assert found["load"] == {"median": 0.2, "most": 1.0}
    assert found["versions"]["torch"] == "9.9" and found["versions"]["jax"] and found["machine"]["cores"] >= 1
    assert found["seconds"] == {"steps": 1.2}


def test_ratios_are_medians_over_rounds_that_both_were_measured_in():
    rows = made()["rows"]
    assert report.ratio(rows, "step/N/ieg") == statistics.median([8 / 1, 14 / 2, 20 / 4]) == 7.0
    assert report.ratio(rows, "step/N/ieg, torch") == 0.5
    assert report.ratio(rows, "predict/N") is None
    rows["step/N/ieg"]["samples"] = [8.0, 8.0]
    rows["step/N/ieg"]["median"] = 8.0
    assert report.ratio(rows, "step/N/ieg") == 4.0, "of the medians, where rounds are not the same"
    rows["step/N/supervised"]["samples"][0] = 0.0
    assert report.ratio(rows, "step/N/ieg") is None


def test_the_table_has_a_line_for_each_row_and_what_was_skipped():
    text = printed(report.table(made(notes=["skipped: torch is not here"])))
    assert "skipped: torch is not here" in text
    line = next(line for line in text.splitlines() if "step/N/ieg " in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["step/N/ieg", "14", "11–17", "s", "7.00", "73", "7.30", "7.33", "5.21", "30", "0.1"]
    lines = report.markdown(made()).splitlines()
    assert len(lines) == 2 + len(ROWS) and len({line.count("|") for line in lines}) == 1


def test_the_file_comes_back_and_no_file_is_written_over(tmp_path):
    first = made()
    path = report.path_of(first, tmp_path)
    report.write(first, path)
    assert report.read(str(path)) == first
    assert path.name.startswith(first["date"][:10]) and path.name.endswith("-cores.json")
    assert report.path_of(first, tmp_path).name == path.name.replace(".json", "-2.json")
    assert sum(line.startswith('  "step/') for line in path.read_text().splitlines()) == 3, "a row to a line"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=0), "format 0, expected 1"),
        (lambda r: r.pop("load"), "no load"),
        (lambda r: r["rows"]["predict/N"].update(samples=[]), r"predict/N: samples \[\]"),
        (lambda r: r["rows"]["predict/N"].update(median=9), "outside of its quartiles"),
        (lambda r: r["rows"]["step/N/ieg"].update(others=[1]), "1 loads of 3 samples"),
        (lambda r: r["rows"]["predict/N"].pop("unit"), "unit"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, change, message):
    broken = made()
    change(broken)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(UserError, match=message):
        report.read(str(path))
    with pytest.raises(UserError, match="expected one of benchmarks/results"):
        report.read(str(tmp_path / "nowhere.json"))


def test_every_committed_file_is_a_report():
    files = sorted(report.RESULTS.glob("*.json"))
    assert files
    for path in files:
        report.read(str(path))
        assert path.stat().st_size < 100_000


def test_comparison():
    old, new = made(), made({name: row for name, row in ROWS.items() if name != "predict/N"})
    new["machine"]["cores"] = old["machine"]["cores"] + 1
    for row in new["rows"].values():
        row["median"] *= 3
    text = printed(report.compare(old, new))
    assert sum("3.00" in line for line in text.splitlines()) == 3
    assert "machine: cores" in text and "1 rows then and not now, 0 now and not then" in text
    assert "predict/N" not in text


def test_samples_alternate_and_the_first_of_each_does_not_count():
    order = []

    def call(name):
        order.append(name)
        return {"seconds": float(len(order)), "others": None}

    taken = measure.interleaved({name: lambda name=name: call(name) for name in "ab"}, 2)
    assert order == list("ababab")
    assert [one["seconds"] for one in taken["a"]] == [3.0, 5.0]
    row = measure.rate(taken["b"], 8, "images/s")
    assert row["samples"] == [2.0, 8 / 6] and row["unit"] == "images/s"


def test_a_sample_knows_its_seconds():
    found = measure.sample(lambda: sum(range(10**6)))
    assert 0 < found["seconds"] < 60
    assert found["others"] is None or found["others"] >= 0


def test_settings_are_read_by_their_type():
    config = default.get_config()
    pairs = ["model.dtype=bfloat16", "model.remat=True", "batch_groups=2", "model.width=2"]
    expected = {"model.dtype": "bfloat16", "model.remat": True, "batch_groups": 2, "model.width": 2.0}
    assert options.settings_of(pairs, config) == expected
    with pytest.raises(UserError, match=r"there is no key 'model\.colour'"):
        options.settings_of(["model.colour=red"], config)
    with pytest.raises(UserError, match="expected a value like 1"):
        options.settings_of(["batch_groups=two"], config)
    with pytest.raises(UserError, match="--part: got 'stepz'"):
        options.Options(parts=("stepz",))


def test_the_table_of_scale_is_read():
    text = """N = 10

| what | seconds | of a processor | before, MiB | peak, MiB |
| --- | --- | --- | --- | --- |
| load, as `data.name=features` | 0.7 | 0.5 | 100 | 1,500 |
| first batch, of 256 | 3.5 | 3 | 1 | 2 |
| checkpoint of 520 bytes: the run waits | 0.4 | 1 | 1 | 3 |
| … until it is written | 0.1 | 1 | 1 | 3 |
| audit: estimate | 1.5 | 1 | 1 | 5 |
| audit: audit.html | 2.0 | 1 | 1 | 4 |
"""
    assert children.scale_rows(text) == [
        ("load", 0.7, 1500.0), ("first batch", 3.5, 2.0), ("checkpoint", 0.4, 3.0), ("until it is written", 0.1, 3.0),
        ("audit", 3.5, 5.0),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_steps_of_a_tiny_network(tmp_path, monkeypatch, capsys):
    asked = ["bench", "--quick", "--rounds=2", "--part=steps", "--networks=tiny", "--cache=", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", asked)
    monkeypatch.setattr(steps, "MATRIX", 64)
    monkeypatch.setattr(steps, "CONVOLUTION", (2, 8, 4))
    command.main()
    written = next(tmp_path.glob("*.json"))
    rows = report.read(str(written))["rows"]
    assert list(rows) == [f"step/tiny/{name}" for name in ("supervised", "ieg", "matrix product", "convolution")]
    for name in ("supervised", "ieg"):
        row = rows[f"step/tiny/{name}"]
        assert len(row["samples"]) == 2 and min(row["samples"]) > 0 and row["mib"] > 0
    ieg, supervised = rows["step/tiny/ieg"], rows["step/tiny/supervised"]
    assert ieg["passes"] == 22 and 4 < ieg["gflop"] / supervised["gflop"] < 11
    assert rows["step/tiny/matrix product"]["gflop"] == pytest.approx(2 * 64**3 / 1e9, rel=1e-4)
    assert f"written: {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr("sys.argv", ["bench", f"--read={written}", f"--compare={written}", "--markdown"])
    command.main()
    shown = capsys.readouterr().out
    assert "| step/tiny/ieg |" in shown and "1.00" in shown


def test_batches_are_the_same_for_every_method_and_within_their_sets():
    batches = {
        name: programs.random_batch(
            programs.build(programs.config_of(name, programs.TINY, {}), programs.TINY.size),
            programs.CLASSES,
            programs.EXAMPLES,
        )
        for name in ("supervised", "ieg")
    }
    for name, value in batches["supervised"].items():
        assert (value == batches["ieg"][name]).all()
    assert batches["ieg"]["label"].max() < programs.CLASSES and batches["ieg"]["probe_row"].max() < programs.TRUSTED
    assert not peers.has(programs.TINY) and peers.has(programs.WRN)
