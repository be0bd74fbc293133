import pytest

from ieg_jax import cli
from ieg_jax.errors import UserError


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config=configs/nope.py"], r"cannot be loaded .*No such file.*nope.py"),
        (["--config=configs/quickstart.py:methd=l2r"], r"unknown config argument 'methd'; known arguments: method"),
        (["--config=configs/quickstart.py", "--config.modle.name=x"], r"under config: got 'modle', .*'model'"),
        (["--config=configs/quickstart.py", "--config.model.nam=x"], r"under config.model: got 'nam', .*'name'"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        cli._check_overrides(["main", *argv])


def test_what_is_right_passes():
    cli._check_overrides(["main", "--config=configs/quickstart.py:seed=3", "--config.model.name=tiny", "--workdir=x"])
    cli._check_overrides(["main", "--workdir=x"])


def test_load_config_passes_the_arguments():
    assert cli.load_config("configs/quickstart.py:seed=3").seed == 3
    assert cli.load_config("configs/quickstart.py").seed == 0
