"""Every configuration file loads and trains: on small data in the genuine format, with a narrow network."""

import gzip
import pathlib

import numpy as np
import pytest
from test_sources import idx

from ieg_jax import cli, train

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def use_fixture_data(config, folder):
    rng = np.random.default_rng(0)
    if config.data.name == "fashion_mnist":
        for part, n in (("train", 200), ("t10k", 50)):
            images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            labels = (np.arange(n) % 10).astype(np.uint8)
            for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
                (folder / name).write_bytes(gzip.compress(idx(array)))
        config.data.dir = str(folder)
    elif config.data.name == "arrays":
        config.data.train = str(folder / "own.npz")
        np.savez(
            config.data.train,
            images=rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8),
            labels=np.arange(80) % 4,
            trusted_images=rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
            trusted_labels=np.arange(4),
        )


@pytest.mark.parametrize("name, arguments", [*((name, "") for name in FILES), ("quickstart.py", "reference=paper")])
def test_one_step(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.load_config(f"configs/{name}:{arguments}")
    use_fixture_data(config, tmp_path)
    config.model.width, config.mesh.data = 0.25, 1
    config.num_train_steps, config.num_train_epochs = 1, 0.0
    result = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert result["steps"] == 1
    assert 0 <= result["trusted_accuracy"] <= 1


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_how_to_run_it_and_what_to_expect(name):
    text = (ROOT / "configs" / name).read_text().split('"""')[1]
    if name != "default.py":
        assert f"--config=configs/{name}" in text
        assert "ccuracy" in text
