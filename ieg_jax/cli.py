"""What the commands share: flags with a configuration file, and errors as one clear line."""

import functools
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from ieg_jax.errors import NonFiniteError, StorageError, UserError, check_choice

CONFIG_HELP = (
    "Configuration file, with arguments behind a colon: configs/quickstart.py:method=l2r,noise_rate=0.4. "
    "Any key is set with --config.group.key=value; configs/default.py lists them."
)


def define_config_flag() -> flags.FlagHolder:
    """Defines the required flag --config."""
    holder = config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[list[str]], None], interrupted: str = "", positional: int | None = 0) -> None:
    """Parses the flags and calls `main`.

    A UserError, NonFiniteError or StorageError, Ctrl-C, and whatever is wrong with the flags, ends the program with one
    message and status 1; --help and its like with status 0. Logs of libraries are shown from warnings up unless
    --verbosity says otherwise.

    Args:
      main: takes what is left of the command line.
      interrupted: what to say after Ctrl-C besides that it was stopped.
      positional: how many arguments that are no options `main` takes at most; None = any number.
    """
    try:
        app.run(main, flags_parser=functools.partial(_parse, positional=positional))
    except (UserError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except StorageError as error:
        end_at_once(error)
    except KeyboardInterrupt:
        sys.exit(f"stopped; {interrupted}" if interrupted else "stopped")


def end_at_once(error: Exception) -> NoReturn:
    """Ends this process with status 1 and one message, for what is the program's mistake with its traceback.

    An orderly exit would report whatever the writers left behind after the message, and wait for other processes,
    which may be waiting for this one.
    """
    if isinstance(error, UserError | NonFiniteError | StorageError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def load_config(specification: str) -> ConfigDict:
    """Loads `path` or `path:arguments`.

    Raises:
      UserError: where there is no such file or it does not take the arguments.
    """
    path, _, arguments = specification.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
    except (OSError, KeyError) as error:
        raise UserError(f"--config={specification}: cannot be loaded ({error}); expected a file of configs/") from None
    return get_config(arguments) if arguments else get_config()


def check_new_folder(flag: str, folder: epath.Path) -> None:
    """Raises UserError unless `folder` can be made, or is there and empty: nothing is to be overwritten."""
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{flag}={folder}: {place} is a file, expected a folder")
            break
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{flag}={folder} is not empty; name a new folder")


def _parse(argv: list[str], positional: int | None) -> list[str]:
    if not any(argument.startswith(("--verbosity", "-v")) for argument in argv):
        logging.set_verbosity(logging.WARNING)
    try:
        arguments = flags.FLAGS(argv)
    except SystemExit as stop:
        # absl exits with 1 after help that was asked for.
        sys.exit(0 if any(argument.lstrip("-").startswith(("help", "?")) for argument in argv[1:]) else stop.code)
    except Exception as error:
        # The libraries report some mistakes as tracebacks of their own: look for the mistake first.
        _check_overrides(argv)
        raise UserError(str(error)) from None
    _check_overrides(argv)
    if positional is not None and len(arguments) > 1 + positional:
        raise UserError(f"unexpected arguments {arguments[1 + positional :]}; options begin with --")
    return arguments


def _check_overrides(argv: list[str]) -> None:
    """Raises UserError for a configuration that does not load and for the first --config.key that is unknown."""
    values = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    if not values:
        return
    config = load_config(values[-1])
    for argument in argv:
        if argument.startswith("--config."):
            group, where = config, "config"
            for part in argument.partition("=")[0].split(".")[1:]:
                check_choice(f"unknown key in {argument}: under {where}", part, group.keys())
                group, where = group[part], f"{where}.{part}"
                if not isinstance(group, ConfigDict):
                    break
