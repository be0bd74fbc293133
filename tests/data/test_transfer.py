"""Images on their way to the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.data import transfer
from ieg_jax.data.batches import EvalBatches, train_batches
from ieg_jax.data.load import load_data
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf
from ieg_jax.train import check

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
IMAGES = ("image", "views", "probe_image")


def first_batch(kind, **overrides):
    config = default.get_config()
    config.batch_size, config.trusted.batch_size = 16, 8
    config.update_from_flattened_dict(overrides | {"data.transfer": kind})
    data = load_data(config)
    return config, data, next(train_batches(config, data, methods.get("ieg").streams, 3, 4, SHARDING))


def test_float32_is_what_it_was():
    _, _, batch = first_batch("float32")
    assert {batch[name].dtype for name in IMAGES} == {jnp.dtype("float32")}
    received = transfer.received(batch)
    assert all(received[name] is batch[name] for name in batch)


def test_bfloat16_is_half_the_bytes_rounded():
    _, _, plain = first_batch("float32")
    _, _, batch = first_batch("bfloat16")
    received = jax.jit(transfer.received)(batch)
    for name, array in plain.items():
        if name in IMAGES:
            assert (batch[name].dtype, 2 * batch[name].nbytes) == (jnp.bfloat16, array.nbytes)
            assert received[name].dtype == jnp.float32
            # Rounded by hand: the lower 16 bits are dropped after half of them and one for an odd neighbour are added.
            bits = np.asarray(array).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            np.testing.assert_array_equal(np.asarray(received[name]).view(np.uint32), rounded)
            assert np.abs(received[name] - array).max() <= 2**-9
        else:
            np.testing.assert_array_equal(batch[name], array, err_msg=name)
            assert batch[name].dtype == received[name].dtype == array.dtype


def test_uint8_is_a_quarter_of_the_bytes_and_exact_for_whole_grey_levels():
    exact = {"augment.standard": "crop(pad=1)", "augment.strong": "flip|crop(pad=2)"}
    for overrides, most in ((exact, 2e-7), ({}, 1 / 255 + 1e-6)):  # the usual strong view is resampled
        _, _, plain = first_batch("float32", **overrides)
        _, _, batch = first_batch("uint8", **overrides)
        received = jax.jit(transfer.received)(batch)
        for name in IMAGES:
            assert (batch[name].dtype, 4 * batch[name].nbytes) == (jnp.uint8, plain[name].nbytes)
            assert np.abs(received[name] - plain[name]).max() <= most
        np.testing.assert_array_equal(batch["label"], plain["label"])


def test_grey_levels_by_hand():
    values = tf.constant([-1.5, -1.0, 0.0, 1.0, 2.0, 254 / 127.5 - 1, 3.4 / 127.5 - 1])
    levels = transfer.sent(values, "uint8").numpy()
    assert levels.tolist() == [0, 0, 128, 255, 255, 254, 3], "127.5 goes to the even neighbour"
    received = transfer.received({"image": jnp.asarray(levels)})["image"]
    np.testing.assert_allclose(received, levels / 127.5 - 1, atol=1e-7)


def test_an_evaluation_is_float32():
    config, data, _ = first_batch("bfloat16")
    config.eval_batch_size = 50
    assert next(iter(EvalBatches(config, data.evaluation, SHARDING)))["image"].dtype == jnp.float32


def test_the_key():
    config = default.get_config()
    config.data.transfer = "float16"
    with pytest.raises(UserError, match="data.transfer: got 'float16', expected one of float32, bfloat16, uint8"):
        check.validate(config)
    # It changes the results by rounding, so a run does not change it on its way; older runs had float32.
    assert config_lib.differences({}, {"data.transfer": "float32"}) == []
    assert config_lib.differences({}, {"data.transfer": "uint8"}) == ["data.transfer: 'float32' -> 'uint8'"]
