"""Every configuration file loads and trains: on small data in the genuine format, with a narrow network."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import archives
import image_trees
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
    elif config.data.name == "image_csv":
        lines = {"train": ["path,label"], "trusted": ["path,label"]}
        for number in range(24):
            image_trees.save(folder / f"{number}.jpg", image_trees.picture(number))
            lines["trusted" if number < 4 else "train"].append(f"{number}.jpg,{'ab'[number % 2]}")
        for part, text in lines.items():
            (folder / f"{part}.csv").write_text("\n".join(text))
            config.data[part] = str(folder / f"{part}.csv")
        config.data.image_size, config.batch_size = 16, 8
    elif config.data.name == "arrays":
        config.data.train = str(folder / "own.npz")
        np.savez(
            config.data.train,
            images=rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8),
            labels=np.arange(80) % 4,
            trusted_images=rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
            trusted_labels=np.arange(4),
        )


PUBLISHED = {"cifar10.py", "cifar100.py", "webvision_mini.py", "webvision.py"}  # by the command, see below
IN_PROCESS = [name for name in FILES if name not in PUBLISHED]


@pytest.mark.parametrize(
    "name, arguments", [*((name, "") for name in IN_PROCESS), ("quickstart.py", "reference=paper")]
)
def test_one_step(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.load_config(f"configs/{name}:{arguments}")
    use_fixture_data(config, tmp_path)
    if name != "quickstart.py":  # which has the network of the others, and the compiler takes its time for it
        config.model.name = "tiny"
    config.model.width, config.mesh.data = 0.25, 1
    config.num_train_steps, config.num_train_epochs = 1, 0.0
    result = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert result["steps"] == 1
    assert 0 <= result["trusted_accuracy"] <= 1


def published(name, folder):
    """Writes the data set of a configuration as it is published; the argument of --config and more flags."""
    if name.startswith("cifar"):
        write = archives.cifar_binary if name == "cifar10.py" else archives.cifar_python
        write(folder / "cifar", name.removesuffix(".py"), archives.PUBLISHED)
        flags = [f"--config.data.dir={folder / 'cifar'}", "--config.eval_batch_size=2000"]
        return f"configs/{name}:trusted_per_class=2", flags
    content = image_trees.webvision(folder / "webvision")
    for split, per_class in (("train", 2), ("val", 1)):
        image_trees.imagenet(folder / "imagenet" / split, content["wnids"], per_class, 700)
    argument = f"configs/{name}:imagenet={folder / 'imagenet'}"
    return argument, [
        f"--config.data.dir={folder / 'webvision'}",
        "--config.trusted.per_class=2",
    ]


SMALL = [
    "--config.model.name=tiny",
    "--config.num_train_steps=1",
    "--config.batch_size=8",
    "--config.eval_batch_size=50",
    "--config.mesh.data=1",
]


@pytest.mark.parametrize(
    "name",
    [
        "cifar10.py",
        "webvision_mini.py",
        pytest.param("cifar100.py", marks=pytest.mark.slow),
        pytest.param("webvision.py", marks=pytest.mark.slow),
    ],
)
def test_one_step_on_the_published_files(name, tmp_path):
    argument, flags = published(name, tmp_path)
    command = [sys.executable, "-m", "ieg_jax.main", f"--config={argument}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, *flags, *SMALL], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    classes = {"cifar10.py": 10, "cifar100.py": 100, "webvision_mini.py": 50, "webvision.py": 52}[name]
    assert result["steps"] == 1 and 0 <= result["test_accuracy"] <= 1
    trusted = json.loads((tmp_path / "run" / "trusted.json").read_text())
    assert trusted["per_class"] == [2] * classes


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_how_to_run_it_and_what_to_expect(name):
    text = (ROOT / "configs" / name).read_text().split('"""')[1]
    if name != "default.py":
        assert f"--config=configs/{name}" in text
        assert "ccuracy" in text
