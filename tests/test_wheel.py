"""The package as it is installed: outside the repository, without its configs folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from compilation import FAST_COMPILATION
from runs import CACHE, ROOT


def packed():
    """What launch/Dockerfile copies before it installs: from these files alone the package has to build."""
    before, _, _ = (ROOT / "launch" / "Dockerfile").read_text().partition("pip install")
    copies = (line.split()[1:-1] for line in before.splitlines() if line.startswith("COPY "))
    return [name for names in copies for name in names]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a wheel has in it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *packed()],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in names:
        if (ROOT / name).exists():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel(__import__('sys').argv[1]))"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "source", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, folder / "site"], check=True)
    return folder / "site"


def run(site, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site), "XLA_FLAGS": FAST_COMPILATION}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_is_the_installed_package_that_is_tested(site, tmp_path):
    code = "import ieg_jax, configs" if (ROOT / "configs") in map(str, sys.path) else "import ieg_jax"
    assert run(site, tmp_path, "-c", f"{code}; print(ieg_jax.__file__)").strip() == str(
        site / "ieg_jax" / "__init__.py"
    )


@pytest.mark.slow
def test_a_run_from_a_configuration_of_the_package(site, tmp_path):
    keys = {
        "model.name": "tiny", "num_train_steps": 2, "eval_every_steps": 2, "log_every_steps": 2,
        "checkpoint_every_steps": 2, "batch_size": 16,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    config = "--config=configs/quickstart.py:method=supervised,noise_rate=0.4"
    command = ["-m", "ieg_jax.main", config, "--workdir=run", f"--compilation_cache={CACHE}", *flags]
    result = json.loads(run(site, tmp_path, *command).splitlines()[-1])
    assert (result["steps"], result["noise_rate"]) == (2, 0.4)
    about = "from ieg_jax import inference; print(inference.load('run').image_shape)"
    assert run(site, tmp_path, "-c", about).strip() == "(8, 8, 1)"


def test_the_rows_of_the_paper(site, tmp_path):
    listed = run(site, tmp_path, "-m", "ieg_jax.reproduce", "list", "1")
    assert "paper 93.7 ± 0.5" in listed and "--config=configs/cifar10.py:noise=uniform" in listed
    assert "--seeds" in run(site, tmp_path, "-m", "ieg_jax.quickstart", "--help")


@pytest.mark.slow
def test_the_classifier_and_the_page_of_an_audit(site, tmp_path):
    code = """
import numpy as np, ieg_jax
from ieg_jax.audit import page
X, y = np.eye(3)[np.arange(60) % 3] + 0.1, np.arange(60) % 3
clf = ieg_jax.IEGClassifier(method="supervised", steps=2, batch_size=16, verbose=0).fit(X, y)
print(clf.predict_proba(X[:2]).shape, len(page.jinja2.PackageLoader("ieg_jax.audit").list_templates()))
"""
    assert run(site, tmp_path, "-c", code).strip() == "(2, 3) 1"
