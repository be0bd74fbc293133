import subprocess
import sys

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


@pytest.mark.parametrize("flag", ["--help", "-helpfull"])
def test_help_is_no_failure(flag):
    done = subprocess.run([sys.executable, "-m", "ieg_jax.main", flag], capture_output=True, text=True)
    assert done.returncode == 0 and "--config" in done.stdout and "Traceback" not in done.stderr


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main([]))
    for keys, message in (({}, "stopped"), ({"interrupted": "it goes on"}, "stopped; it goes on")):
        with pytest.raises(SystemExit, match=f"^{message}$"):
            cli.run(main, **keys)
