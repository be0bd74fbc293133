"""Features of images by a network, as a table."""

import json

import jax
import numpy as np
import pytest
import untrained
from PIL import Image
from pyarrow import parquet
from runs import start
from sklearn.datasets import load_digits

from configs import default
from configs import features as features_config
from ieg_jax import inference
from ieg_jax.data import feature_cache
from ieg_jax.data.backbone import Backbone
from ieg_jax.data.load import load_data
from ieg_jax.data.sources import load as sources
from ieg_jax.inference import embedding
from ieg_jax.methods.base import inputs_of_head

SIZE = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An untrained network of colours, and the folder that its weights are exported to."""
    folder = tmp_path_factory.mktemp("embedding") / "weights"
    network = untrained.trained((SIZE, SIZE, 3), "ab", data__name="digits")
    inference.export(network, folder)
    return network, folder


@pytest.fixture
def backbone(trained):
    network, folder = trained
    group = default.get_config().backbone
    group.name, group.pretrained, group.image_size = network.config.model.name, str(folder / "weights.npz"), SIZE
    return Backbone(group)


@pytest.fixture
def source():
    config = default.get_config()
    return sources.load(config.data)  # digits, grey, 8×8


@pytest.fixture
def cache(backbone, tmp_path):
    return feature_cache.cache_of(backbone, str(tmp_path / "cache"), "float32")


def test_the_table_is_one_to_train_on(trained, backbone, cache, source, tmp_path):
    count = embedding.embed(source, tmp_path / "x.parquet", backbone, cache, "float32")
    assert count == len(source.train) + len(source.test)
    table = parquet.read_table(tmp_path / "x.parquet")
    network, _ = trained
    pixels = np.repeat(source.train.images[:40], 3, -1) / np.float32(127.5) - 1
    variables = {"params": network.params, "batch_stats": network.batch_stats}
    expected = inputs_of_head(network.network, variables, pixels)
    np.testing.assert_allclose(np.stack(table["features"].to_pylist()[:40]), expected, atol=1e-5)
    assert json.loads(table.schema.metadata[b"ieg_jax"])["size"] == SIZE
    config = features_config.get_config("trusted=train")
    config.data.train, config.trusted.per_class = str(tmp_path / "x.parquet"), 2
    data = load_data(config)
    np.testing.assert_array_equal(data.evaluation.labels, source.test.labels)
    assert len(data.train) == len(source.train) - 20 and set(data.class_names) == set(map(str, range(10)))


def test_it_goes_on_where_it_was_stopped(backbone, cache, source, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "AT_ONCE", 400)
    embedding.embed(source, tmp_path / "whole.parquet", backbone, cache, "float32")
    other, real, calls = feature_cache.cache_of(backbone, str(tmp_path / "other"), "float32"), cache.write, []

    def stops(self, keys, values):
        calls.append(len(keys))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real.__func__(self, keys, values)

    monkeypatch.setattr(feature_cache.Cache, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        embedding.embed(source, tmp_path / "x.parquet", backbone, other, "float32")
    assert not (tmp_path / "x.parquet").exists()
    embedding.embed(source, tmp_path / "x.parquet", backbone, other, "float32")
    total = -(-len(source.train) // 400) + -(-len(source.test) // 400)
    assert len(calls) == 3 + total - 2, "the first two parts are not computed again"
    whole, again = (parquet.read_table(tmp_path / name) for name in ("whole.parquet", "x.parquet"))
    assert whole.equals(again)
    # The same command in another process has ended in the meantime: its table stays.
    before = (tmp_path / "x.parquet").stat()
    embedding.embed(source, tmp_path / "x.parquet", backbone, other, "float32")
    assert (tmp_path / "x.parquet").stat() == before


@pytest.mark.slow
def test_the_command_on_files_of_which_nothing_is_known(trained, tmp_path):
    for number, digit in enumerate(load_digits().images[:5]):
        Image.fromarray(np.uint8(digit * 15)).save(tmp_path / f"{number}.png")
    network, folder = trained
    flags = [f"--network={network.config.model.name}", f"--weights={folder / 'weights.npz'}", f"--size={SIZE}"]
    flags += [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'x.parquet'}"]
    arguments = ["-m", "ieg_jax.embed", *flags, tmp_path]
    (process,) = start(arguments)
    assert process.wait() == 0
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.num_rows == 5 and "label" not in table.column_names
    assert [path.endswith(f"{number}.png") for number, path in enumerate(table["path"].to_pylist())] == [True] * 5
    assert len(jax.tree.leaves(table["features"][0].as_py())) > 1
