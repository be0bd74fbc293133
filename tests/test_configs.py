"""Every configuration file loads and trains: on small data in the genuine format, with a narrow network."""

import gzip
import json
import os
import re
import subprocess
import sys

import archives
import image_trees
import numpy as np
import pytest
import untrained
from archives import idx
from runs import ROOT

from configs import default, own_data, webvision, webvision_mini
from ieg_jax import cli, hardware, inference, models
from ieg_jax import config as config_lib
from ieg_jax.data import shards
from ieg_jax.data.sources import cifar
from ieg_jax.errors import UserError
from ieg_jax.models import pretrained
from ieg_jax.reproduce import catalogue, results
from ieg_jax.train import check, schedules
from ieg_jax.train.loop import train_and_evaluate

FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def use_fixture_data(config, folder):
    rng = np.random.default_rng(0)
    if config.backbone.name:
        small_backbone(config, folder)
    if config.data.name == "fashion_mnist":
        for part, n in (("train", 200), ("t10k", 50)):
            images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            labels = (np.arange(n) % 10).astype(np.uint8)
            for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
                (folder / name).write_bytes(gzip.compress(idx(array)))
        config.data.dir, config.data.train_size = str(folder), 0
    elif config.data.name == "image_csv":
        lines = {"train": ["path,label"], "trusted": ["path,label"]}
        for number in range(24):
            image_trees.save(folder / f"{number}.jpg", image_trees.picture(number))
            lines["trusted" if number < 4 else "train"].append(f"{number}.jpg,{'ab'[number % 2]}")
        for part, text in lines.items():
            (folder / f"{part}.csv").write_text("\n".join(text))
            config.data[part] = str(folder / f"{part}.csv")
        config.data.image_size, config.batch_size = 0 if config.backbone.name else 16, 8
    elif config.data.name == "arrays":
        config.data.train = str(folder / "own.npz")
        np.savez(
            config.data.train,
            images=rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8),
            labels=np.arange(80) % 4,
            trusted_images=rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
            trusted_labels=np.arange(4),
        )
    elif config.data.name == "features":
        config.data.train = str(folder / "own.npz")
        np.savez(
            config.data.train,
            features=rng.normal(size=(80, 6)),
            labels=np.arange(80) % 4,
            trusted_features=rng.normal(size=(4, 6)),
            trusted_labels=np.arange(4),
        )


def small_backbone(config, folder):
    """A backbone with random weights, of images of 16 pixels."""
    inference.export(untrained.trained((16, 16, 3), "ab", data__name="digits"), folder / "backbone")
    config.backbone.update({"name": "tiny", "pretrained": str(folder / "backbone" / "weights.npz"), "image_size": 16})
    config.backbone.update({"augment": "random_resized_crop(16)|flip", "cache": str(folder / "cache")})


def make_tiny(config):
    """The network of two convolutions, which reads no other key of the group but the width."""
    config.model.update(default.get_config().model)
    config.model.name = "tiny"


# By the command, see below.
PUBLISHED = {"cifar10.py", "cifar100.py", "webvision_mini.py", "webvision.py"}
FURTHER_BELOW = ("cifar10n.py", "cifar10_small.py")
IN_PROCESS = [name for name in FILES if name not in (*PUBLISHED, *FURTHER_BELOW)]
LIKE_OTHERS = ("default.py", "digits.py", "fashion_mnist.py", "features.py")  # whose parts others have too


@pytest.mark.parametrize(
    "name", ["quickstart.py", "digits.py", "fashion_mnist.py", "fashion_mnist.py:model=mlp", "cifar10_small.py"]
)
def test_a_short_run_ends_with_a_cycle_of_the_learning_rate(name):
    """Else the accuracy that counts is that of the end of an earlier cycle."""
    config = cli.load_config(str(ROOT / "configs" / name))
    ends = schedules.cycle_ends(config.schedule.first_cycle_steps, config.schedule.cycle_mult, config.num_train_steps)
    assert ends[-1] == config.num_train_steps


@pytest.mark.parametrize(
    "name, arguments",
    [
        *((name, "") for name in IN_PROCESS if name not in LIKE_OTHERS),
        *(pytest.param(name, "", marks=pytest.mark.slow) for name in LIKE_OTHERS),
        pytest.param("quickstart.py", "reference=paper", marks=pytest.mark.slow),
    ],
)
def test_one_step(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = cli.load_config(f"configs/{name}:{arguments}")
    use_fixture_data(config, tmp_path)
    if name != "quickstart.py":  # which has the network of the others, and the compiler takes its time for it
        make_tiny(config)
    config.model.width, config.mesh.data = 0.25, 1
    config.num_train_steps, config.num_train_epochs = 1, 0.0
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert result["steps"] == 1
    assert 0 <= result["trusted_accuracy"] <= 1


def structures():
    """One experiment of those that differ by numbers alone: noise rate, size of the trusted set, weights of losses."""
    found = {}
    for table in (table for name, table in catalogue.tables().items() if not name.startswith("tune-")):
        for experiment in table.experiments.values():
            signature = re.sub(r"\d+\.?\d*", "", experiment.name.replace("wrn28_2", "wrn28_10"))
            found.setdefault(signature, experiment)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("signature", structures())
def test_one_step_of_every_experiment(signature, tmp_path, monkeypatch):
    """With its own network, but narrow, on files in the published format."""
    monkeypatch.chdir(ROOT)
    sizes = {"train": 1000, "test": 20}  # so many that each class is left with images beside the noise
    monkeypatch.setattr(cifar, "SIZES", sizes)
    config = results.load_config(structures()[signature], 0)
    use_fixture_data(config, tmp_path)
    if config.data.name.startswith("cifar"):
        content = archives.cifar_tfds(tmp_path, config.data.name, sizes)
        config.data.dir, config.data.train_size, config.trusted.per_class = str(tmp_path), 0, 1
        if config.noise.kind == "human":
            config.noise.file = str(tmp_path / "human.pt")
            archives.human_labels(tmp_path / "human.pt", config.data.name, content["train"][1])
        if config.noise.kind == "file":
            (tmp_path / "labels.json").write_text(json.dumps([number % 10 for number in range(sizes["train"])]))
            config.noise.file = str(tmp_path / "labels.json")
        if config.noise.kind == "open_set":
            archives.cifar_tfds(tmp_path / "foreign", "cifar100", sizes)
            config.noise.open_set = f"cifar100:{tmp_path / 'foreign'}"
    elif config.data.name == "webvision":
        name = "webvision_mini.py" if config.data.variant == "mini" else "webvision.py"
        content = image_trees.webvision(tmp_path / "webvision", CLASSES[name])
        for split, per_class in (("train", 2), ("val", 1)):
            image_trees.imagenet(tmp_path / "imagenet" / split, content["wnids"], per_class, 700)
        config.data.dir, config.data.test = str(tmp_path / "webvision"), str(tmp_path / "imagenet")
        config.data.trusted, config.trusted.per_class = config.data.test, 2
    config.mesh.data = 1
    if "width" in models.REGISTRY[config.model.name].READS:
        config.model.width = 1 / 16
    config.model.depth = 10 if config.model.name == "wide_resnet" else config.model.depth
    config.batch_size, config.num_train_steps, config.num_train_epochs = 8, 1, 0.0
    config.eval_batch_size = 8
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert result["steps"] == 1 and 0 <= result["trusted_accuracy"] <= 1


def one_step(config, folder):
    make_tiny(config)
    config.model.width, config.mesh.data = 0.25, 1
    config.batch_size, config.num_train_steps, config.num_train_epochs = 8, 1, 0.0
    result = train_and_evaluate(config, str(folder / "run"))
    assert result["steps"] == 1 and 0 <= result["test_accuracy"] <= 1
    return result


def test_one_step_on_records(tmp_path, monkeypatch):
    """Own images of various sizes, prepared, and read by random access."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(28):
        part = "trusted" if number < 4 else "test" if number < 8 else "train"
        picture = image_trees.picture(number, (30 + number, 60 - number))
        image_trees.save(tmp_path / part / "ab"[number % 2] / f"{number}.jpg", picture)
    config = cli.load_config("configs/own_data.py:source=image_folder,backbone=none,size=0")
    config.data.update({part: str(tmp_path / part) for part in ("train", "test", "trusted")})
    shards.prepare(config, tmp_path / "records", examples_per_shard=7)
    config.data.update(name="records", dir=str(tmp_path / "records"), train="", test="", trusted="")
    config.augment.standard, config.augment.evaluation = "random_resized_crop(16)|flip", "resize(16)|center_crop(16)"
    assert one_step(config, tmp_path)["trusted_per_class"] == 2


def test_one_step_on_features_of_cifar(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    _, true = archives.cifar_tfds(tmp_path, "cifar10", archives.SMALL)["train"]
    archives.human_labels(tmp_path / "human.pt", "cifar10", true)
    config = cli.load_config("configs/cifar10n.py:trusted_per_class=1")
    config.data.dir, config.noise.file, config.trusted.holdout = str(tmp_path), str(tmp_path / "human.pt"), 0.0
    small_backbone(config, tmp_path)
    config.mesh.data, config.num_train_steps, config.num_train_epochs = 1, 1, 0.0
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert result["steps"] == 1 and result["model"] == "mlp" and 0 <= result["test_accuracy"] <= 1


@pytest.mark.parametrize(
    "specification", ["cifar10_small.py:labels=worse", pytest.param("cifar10.py:noise=human", marks=pytest.mark.slow)]
)
def test_one_step_on_cifar_of_tfds_with_human_labels(specification, tmp_path, monkeypatch):
    """TFDS keeps the images in an order of its own; the labels are joined by id."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cifar, "SIZES", archives.SMALL)
    _, true = archives.cifar_tfds(tmp_path, "cifar10", archives.SMALL)["train"]
    given = archives.human_labels(tmp_path / "CIFAR-10_human.pt", "cifar10", true)["worse_label"]
    config = cli.load_config(f"configs/{specification},trusted_per_class=1")
    config.data.dir, config.data.train_size = str(tmp_path), 0
    config.noise.file, config.noise.label_set = str(tmp_path / "CIFAR-10_human.pt"), "worse"
    assert one_step(config, tmp_path)["noise"] == "human"
    noise, trusted = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("noise", "trusted"))
    assert json.loads((tmp_path / "run" / "noisy_labels.json").read_text()) == given.tolist()
    left = np.setdiff1d(np.arange(50), trusted["ids"])
    assert noise["rate_effective"] == pytest.approx(np.mean(given[left] != true[left]))
    assert noise["rate"] is None and len(noise["file_sha256"]) == 64


CLASSES = {"cifar10.py": 10, "cifar100.py": 100, "webvision_mini.py": 52, "webvision.py": 4}  # in what is written


def published(name, folder):
    """Writes the data set of a configuration as it is published; the argument of --config and more flags."""
    if name.startswith("cifar"):
        write = archives.cifar_binary if name == "cifar10.py" else archives.cifar_python
        write(folder / "cifar", name.removesuffix(".py"), archives.PUBLISHED)
        # Evaluated on few images: going through the ten thousand for testing takes longer than all the rest.
        flags = [f"--config.data.dir={folder / 'cifar'}", "--config.data.validation_size=50"]
        return f"configs/{name}:trusted_per_class=2", flags
    content = image_trees.webvision(folder / "webvision", CLASSES[name])
    for split, per_class in (("train", 2), ("val", 1)):
        image_trees.imagenet(folder / "imagenet" / split, content["wnids"], per_class, 700)
    argument = f"configs/{name}:imagenet={folder / 'imagenet'}"
    return argument, [
        f"--config.data.dir={folder / 'webvision'}",
        "--config.trusted.per_class=2",
    ]


SMALL = [
    "--config.model.name=tiny",
    "--config.model.depth=10",  # tiny does not read it, so it must have its default
    "--config.num_train_steps=1",
    "--config.batch_size=8",
    "--config.eval_batch_size=50",
    "--config.mesh.data=1",
    f"--compilation_cache={ROOT / '.cache' / 'xla'}",  # that of the other tests
]


SLOWER = {"cifar10.py", "cifar100.py", "webvision.py", "webvision_mini.py"}  # tests/data/sources reads their archives


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOWER)) for name in sorted(PUBLISHED)]
)
def test_one_step_on_the_published_files(name, tmp_path):
    argument, flags = published(name, tmp_path)
    command = [sys.executable, "-m", "ieg_jax.main", f"--config={argument}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, *flags, *SMALL], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    accuracy = result["validation_accuracy" if name.startswith("cifar") else "test_accuracy"]
    assert result["steps"] == 1 and 0 <= accuracy <= 1
    trusted = json.loads((tmp_path / "run" / "trusted.json").read_text())
    assert trusted["per_class"] == [2] * (50 if name == "webvision_mini.py" else CLASSES[name])


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_says_how_to_run_it_and_what_to_expect(name):
    text = (ROOT / "configs" / name).read_text().split('"""')[1]
    if name != "default.py":
        assert f"--config=configs/{name}" in text
        assert "ccuracy" in text


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "finetune", "none", "auto"])
def test_own_photographs(backbone, monkeypatch):
    monkeypatch.setattr(pretrained, "is_installed", lambda network: True)
    monkeypatch.setattr(own_data.hardware, "accelerator_is_here", lambda: False)
    config = own_data.get_config(f"backbone={backbone},size=48,augment=symbols")
    config.data.train, config.data.trusted = "labels.csv", "trusted.csv"
    check.validate(config_lib.resolve(config))
    frozen = backbone in ("auto", "efficientnet_lite0")
    assert (config.backbone.name, config.model.name) == {
        "none": ("", "wide_resnet"), "finetune": ("", "efficientnet_lite0"),
    }.get(backbone, ("efficientnet_lite0", "mlp"))  # fmt: skip
    assert config.backbone.image_size == (48 if frozen else 112)
    assert "flip" not in (config.backbone.augment if frozen else config.augment.standard)
    assert (config.meta.layers == "^head/") == (backbone == "finetune")
    monkeypatch.setattr(own_data.hardware, "accelerator_is_here", lambda: True)
    if backbone == "auto":
        assert own_data.get_config().model.name == "efficientnet_lite0"
    monkeypatch.setattr(pretrained, "is_installed", lambda network: False)
    assert own_data.get_config().model.name == "wide_resnet"


@pytest.mark.parametrize("file", [webvision, webvision_mini])
def test_webvision_computes_in_what_suits_the_device(file, monkeypatch):
    for here, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(hardware, "accelerator_is_here", lambda here=here: here)
        config = file.get_config("imagenet=imagenet")
        assert (config.model.dtype, config.data.transfer) == (expected, expected)
        assert file.get_config("dtype=float32").model.dtype == "float32"
        assert file.get_config("dtype=bfloat16").model.dtype == "bfloat16"
        config.data.dir = "webvision"
        check.validate(config_lib.resolve(config))
    with pytest.raises(UserError, match="dtype: got 'float16', expected one of auto, bfloat16, float32"):
        file.get_config("dtype=float16")
