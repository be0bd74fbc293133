import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from ieg_jax.reproduce import quickstart as quickstart_runs


def test_table_says_mean_and_spread():
    def result(accuracy, seed):
        return {
            "dataset": "digits", "noise": "uniform", "noise_rate": 0.8, "noise_rate_effective": 0.717,
            "trusted_per_class": 1, "test_accuracy": accuracy, "seed": seed, "wall_seconds": 10.0, "num_devices": 1,
            "device_kind": "cpu", "versions": {"jax": "1.2.3"},
        }  # fmt: skip

    results = {name: [result(0.9, 0), result(0.96, 1)] for name in quickstart_runs.RUNS}
    console = Console(file=io.StringIO(), width=200)
    quickstart_runs.show_table(results, console)
    text = console.file.getvalue()
    assert "93.0 ± 4.2" in text  # the standard deviation of 90 and 96 is 3·√2
    for words in ("chance", "upper bound", "72% of the labels wrong", "seeds 0, 1"):
        assert words in text


def test_picture(tmp_path):
    from PIL import Image

    for name in quickstart_runs.RUNS:
        folder = tmp_path / f"{name}-0"
        folder.mkdir()
        config = {"batch_size": 64, "noise": {"rate": 0.8}, "trusted": {"per_class": 1}}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [{"step": s, "test/accuracy": s / 20, "weight/clean": 0.02, "weight/noisy": 0.01} for s in (5, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quickstart_runs.draw_picture(tmp_path, 0, tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        "from configs import quickstart\n"
        "def get_config(arguments=''):\n"
        "    config = quickstart.get_config(arguments)\n"
        "    config.model.name = 'tiny'\n"
        "    config.num_train_steps, config.log_every_steps, config.eval_every_steps = 4, 2, 2\n"
        "    return config\n"
    )
    command = [
        sys.executable, "-m", "ieg_jax.quickstart", f"--workdir={tmp_path / 'q'}", f"--config_file={file}", "--seeds=3",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "upper bound" in done.stdout
    assert (tmp_path / "q" / "quickstart.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "q" / "results.json").read_text())
    assert {name: len(runs) for name, runs in results.items()} == dict.fromkeys(quickstart_runs.RUNS, 1)
    assert results["clean"][0]["noise_rate_effective"] == 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "compiled" not in again.stdout, "what is finished is not trained again"
