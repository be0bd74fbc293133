import gc
import importlib
import pkgutil
import subprocess
import sys

import pytest
from absl import flags
from runs import ROOT

import ieg_jax
from ieg_jax import cli
from ieg_jax.errors import Interrupted, UserError


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


def test_what_a_key_implies():
    """A network that is named sees images, not the features of a backbone; unless the backbone is named too."""

    def arguments(*argv):
        return cli._with_found_config(["main", *argv])[1].partition(":")[2]

    own = "--config=configs/own_data.py"
    assert arguments(own) == "" and arguments(own, "--config.model.width=2") == ""
    assert arguments(own, "--config.model.name=tiny") == "backbone=none"
    assert arguments(f"{own}:size=8", "--config.model.name=tiny") == "size=8,backbone=none"
    assert arguments(f"{own}:backbone=auto", "--config.model.name=mlp") == "backbone=auto"
    assert arguments("--config=configs/nope.py:a=1", "--config.model.name=tiny") == "a=1"


@pytest.mark.parametrize("flag", ["--help", "-helpfull"])
def test_help_is_no_failure(flag):
    done = subprocess.run([sys.executable, "-m", "ieg_jax.main", flag], capture_output=True, text=True)
    assert done.returncode == 0 and "--config" in done.stdout and "Traceback" not in done.stderr


def test_commands_can_be_imported_together():
    """A command defines its flags when it is run: several have flags of the same names."""
    modules = [module.name for module in pkgutil.walk_packages(ieg_jax.__path__, "ieg_jax.")]
    assert "ieg_jax.plan" in modules and "ieg_jax.data.doctor" in modules
    for module in modules:
        importlib.import_module(module)
    ours = [name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name, "").startswith("ieg_jax")]
    assert ours == []


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main([]))
    for error, status in ((KeyboardInterrupt(), 1), (Interrupted("stopped"), 75)):

        def main(argv, error=error):
            raise error

        for keys, message in (({}, "stopped\n"), ({"interrupted": "it goes on"}, "stopped; it goes on\n")):
            with pytest.raises(SystemExit) as end:
                cli.run(main, **keys)
            assert (end.value.code, capsys.readouterr().err) == (status, message)


def test_a_command_collects_garbage_seldom(monkeypatch):
    before, seen = gc.get_threshold(), []
    monkeypatch.setattr(sys, "argv", ["command"])
    gc.set_threshold(700, 10, 10)
    try:
        with pytest.raises(SystemExit):
            cli.run(lambda argv: seen.append(gc.get_threshold()))
    finally:
        gc.set_threshold(*before)
    assert seen == [cli.GARBAGE_THRESHOLDS]


@pytest.mark.parametrize(
    "shell, lines, shown",
    [
        ("PYTHONIOENCODING=ascii {}", 9, "\\u03c9\n" * 9),
        ("{} | head -1", 50_000, "ω\n"),  # more than fits into a pipe
        ("{} >&-", 9, ""),
    ],
)
def test_whatever_becomes_of_the_output(shell, lines, shown, tmp_path):
    """A terminal that knows no Greek, a reader that has gone, and none at all."""
    script = tmp_path / "script.py"
    script.write_text(
        "from ieg_jax import cli\n"
        "def main(argv):\n    for _ in range(int(argv[1])):\n        print('ω', flush=True)\n"
        "cli.run(main, positional=1)\n"
    )
    command = shell.format(f"PYTHONPATH={ROOT} {sys.executable} {script} {lines}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", shown)
