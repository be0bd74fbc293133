import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow as tf
import untrained
from runs import ROOT

from ieg_jax import inference
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError

SIZES = (1, 3, 17)
# What jax makes for TensorFlow needs one of its age; of newer pairs none is known yet that go together.
TENSORFLOW_KNOWS = jax.__version_info__ < (0, 11)
ELSEWHERE = """
import json, pathlib, sys
import jax, numpy as np
from jax import export

folder = pathlib.Path(sys.argv[1])
about = json.loads((folder / "signature.json").read_text())
exported = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
images = np.load(sys.argv[2])
assert about["input"]["dtype"] == str(images.dtype) and about["input"]["shape"][1:] == list(images.shape[1:])
np.savez(sys.argv[3], *[exported.call(images[:count]) for count in (1, 3, 17)])
assert len(jax.devices()) == 1 and not [name for name in sys.modules if name.split(".")[0] in ("ieg_jax", "flax")]
print(*about["class_names"], *exported.platforms)
"""


@pytest.fixture(scope="module")
def trained():
    return untrained.trained((8, 8, 3), "abcd", data__name="image_folder", data__image_size=8)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def expected(trained, pixels):
    """The direct prediction, which the tests of predict compare with a computation by hand."""
    return inference.predict(trained, make_split(pixels, np.zeros(17)))


def test_stablehlo_without_this_package(trained, pixels, expected, tmp_path):
    inference.export_stablehlo(trained, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.stablehlo", "signature.json"]
    served = inference.load_stablehlo(str(tmp_path / "model"))
    assert served.class_names == tuple("abcd")
    np.save(tmp_path / "images.npy", pixels)
    command = [sys.executable, "-c", ELSEWHERE, "model", "images.npy", "got.npz"]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "a b c d cpu tpu cuda\n"
    with np.load(tmp_path / "got.npz") as got:
        for number, count in enumerate(SIZES):
            elsewhere, here = got[f"arr_{number}"], served(pixels[:count])
            assert elsewhere.dtype == here.dtype == np.float32
            np.testing.assert_allclose(elsewhere, expected[:count], atol=1e-6)
            np.testing.assert_allclose(here, expected[:count], atol=1e-6)


def test_saved_model(trained, pixels, expected, tmp_path):
    if not TENSORFLOW_KNOWS:
        with pytest.raises(UserError, match=f"cannot run what jax {jax.__version__} makes for it.*--format=stablehlo"):
            inference.export_saved_model(trained, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        return
    inference.export_saved_model(trained, tmp_path / "model")
    serve = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    served = inference.load_saved_model(tmp_path / "model")
    for count in SIZES:
        got = serve(image=tf.constant(pixels[:count]))["probabilities"].numpy()
        np.testing.assert_allclose(got, expected[:count], atol=1e-6)
        np.testing.assert_array_equal(served(pixels[:count]), got)


def test_floats_and_what_is_no_such_image(trained, pixels, expected, tmp_path):
    inference.export_stablehlo(trained, tmp_path, "float32")
    served = inference.load_stablehlo(tmp_path)
    np.testing.assert_allclose(served(pixels / np.float32(255)), expected, atol=1e-6)
    assert served.signature["input"] == {"name": "image", "shape": ["n", 8, 8, 3], "dtype": "float32", "range": [0, 1]}
    assert inference.largest_difference(trained, served) < 1e-6
    for wrong in (
        pixels,
        pixels[:0] / np.float32(255),
        pixels[0] / np.float32(255),
        np.zeros((1, 8, 8, 1), np.float32),
    ):
        with pytest.raises(UserError, match=r"expected \[n, 8, 8, 3\], float32 from 0.0 to 1.0"):
            served(wrong)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "wide_resnet"},
        {"name": "tiny", "dtype": "bfloat16"},
        pytest.param({"name": "resnet29_v2", "remat": True}, marks=pytest.mark.slow),
    ],
)
def test_networks(keys, tmp_path):
    keys = {f"model__{key}": value for key, value in keys.items()} | {"model__width": 0.5}
    trained = untrained.trained((32, 32, 3), "abc", data__name="cifar10", **keys)
    inference.export_stablehlo(trained, tmp_path)
    limit = 1e-2 if "model__dtype" in keys else 1e-5
    assert inference.largest_difference(trained, inference.load_stablehlo(tmp_path)) < limit


def test_the_size_of_the_images_is_kept_with_the_weights(tmp_path):
    arrays = untrained.trained((8, 6, 1), "ab", data__name="arrays", data__train=str(tmp_path / "own.npz"))
    inference.export(arrays, tmp_path / "weights")
    assert inference.load(tmp_path / "weights").image_shape == (8, 6, 1)
    inference.export_stablehlo(arrays, tmp_path / "model")
    assert inference.load_stablehlo(tmp_path / "model").signature["input"]["shape"] == ["n", 8, 6, 1]


def test_what_cannot_be_exported_or_read(trained, tmp_path):
    features = untrained.trained((1, 1, 6), "ab", data__name="features", model__name="mlp", model__depth=1)
    with pytest.raises(UserError, match="a network of features is exported with --format=weights alone"):
        inference.export_stablehlo(features, tmp_path / "features")
    assert not (tmp_path / "features").exists()
    with pytest.raises(UserError, match=r"has no model\.stablehlo"):
        inference.load_stablehlo(tmp_path)
    inference.export_stablehlo(trained, tmp_path / "model")
    with pytest.raises(UserError, match="a function without weights that can be read"):
        inference.load(tmp_path / "model")
    (tmp_path / "model" / "model.stablehlo").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"cannot be read by jax {jax.__version__}"):
        inference.load_stablehlo(tmp_path / "model")
    inference.export(trained, tmp_path / "weights")
    with pytest.raises(UserError, match="those of step 7 alone, and not 3"):
        inference.load(tmp_path / "weights", 3)
    assert inference.load(tmp_path / "weights", "7").step == 7
    with pytest.raises(UserError, match="checkpoint 'last', expected the number of a step, or best"):
        inference.load(tmp_path / "weights", "last")


@pytest.mark.slow
def test_the_command(trained, tmp_path):
    inference.export(trained, tmp_path / "weights")
    command = [sys.executable, "-m", "ieg_jax.export", f"--workdir={tmp_path / 'weights'}", "--format=stablehlo"]
    done = subprocess.run([*command, f"--out={tmp_path / 'model'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("tiny of step 7, 4 classes, stablehlo for uint8 images [n, 8, 8, 3], at most ")
    about = json.loads((tmp_path / "model" / "signature.json").read_text())
    assert about["format"] == "stablehlo" and about["class_names"] == list("abcd") and about["versions"]["jax"]
    wrong = subprocess.run([*command, "--out=x", "--format=onnx"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "weights|stablehlo|saved_model" in wrong.stderr.splitlines()[-1]
