"""What the machine has, without starting jax."""

import importlib.util

from ieg_jax import hardware


def test_an_accelerator_needs_a_device_and_the_package_that_uses_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert not hardware.accelerator_is_here(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not hardware.accelerator_is_here(tmp_path), "jax has no CUDA here"
    (tmp_path / "accel0").touch()
    assert hardware.accelerator_is_here(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not hardware.accelerator_is_here(tmp_path)
