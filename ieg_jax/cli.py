"""Holds what the commands share: the flag of the configuration file, and errors that are printed as one clear line."""

import functools
import gc
import io
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from ieg_jax import buckets
from ieg_jax import config as config_lib
from ieg_jax.errors import Interrupted, NonFiniteError, StorageError, UserError, check_choice, drop_output

CONFIG_HELP = (
    "Configuration file, with arguments behind a colon: configs/quickstart.py:method=l2r,noise_rate=0.4. "
    "Any key is set with --config.group.key=value; configs/default.py lists them."
)


STOPPED_AND_SAVED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on
COMPILATION_CACHE = "~/.cache/ieg_jax/xla"  # where runs keep compiled programs unless told otherwise
# Of Python's garbage collector: how many new objects, and how many collections of a generation, before the next one.
# With the usual 700, 10 and 10 it looks at the million objects of the libraries again and again while jax traces: 3 %
# of the processor time of the quickstart, 10 % of that of some tests. Cycles still go, after five million objects.
GARBAGE_THRESHOLDS = (50_000, 10, 10)
UNENDING = "unending"  # the name of a thread that would keep a program from ending


def define_config_flag() -> flags.FlagHolder:
    """Defines the required flag --config."""
    holder = config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[list[str]], None], interrupted: str = "", positional: int | None = 0) -> None:
    """Parses the flags and calls `main`.

    A UserError, a NonFiniteError, a StorageError, Ctrl-C and any mistake in the flags end the program with one message
    and status 1, Interrupted with STOPPED_AND_SAVED. --help and similar flags end it with status 0. Libraries show
    warnings and errors of their logs, unless --verbosity says otherwise.

    Args:
      main: the command; it gets the command line without the flags.
      interrupted: is added to the message after Ctrl-C and to that of Interrupted, to say how to go on.
      positional: how many arguments besides flags `main` takes at most; None = any number.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ω, where the terminal knows no Greek
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    try:
        app.run(main, flags_parser=functools.partial(_parse, positional=positional))
    except (UserError, NonFiniteError) as error:
        _leave(f"error: {error}", 1)
    except StorageError as error:
        end_at_once(error)
    except BrokenPipeError:
        try:
            os.write(sys.stdout.fileno(), b"\n")
        except BrokenPipeError:  # the reader of the output has gone, as `| head` does, and no other one
            drop_output()
            sys.exit(1)
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        message = str(error) or "stopped"
        status = STOPPED_AND_SAVED if isinstance(error, Interrupted) else 1
        _leave(f"{message}; {interrupted}" if interrupted else message, status)


def _leave(message: str, status: int) -> NoReturn:
    """Ends the program with a message and a status, at once where a thread would keep it from ending.

    To be called where the error is handled, whose frames hold what is being computed.
    """
    print(message, file=sys.stderr)
    if any(thread.name == UNENDING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if onednn := sys.modules.get("ieg_jax.models.onednn"):
        onednn.finish()
    sys.exit(status)


def end_at_once(error: Exception) -> NoReturn:
    """Ends this process at once, with status 1 and one message.

    An error of the program itself is shown with its traceback. An orderly exit would let threads that still write
    report their failures after the message, and it would wait for the other processes, which may be waiting for this
    one.
    """
    if isinstance(error, UserError | NonFiniteError | StorageError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def load_config(specification: str) -> ConfigDict:
    """Loads a configuration from `path` or `path:arguments`.

    Raises:
      UserError: where there is no such file, or where it does not take the arguments.
    """
    path, _, arguments = specification.partition(":")
    try:
        get_config = runpy.run_path(config_lib.find_file(path))["get_config"]
    except (OSError, KeyError) as error:
        raise UserError(f"--config={specification}: cannot be loaded ({error}); expected a file of configs/") from None
    return get_config(arguments) if arguments else get_config()


def check_new_folder(flag: str, folder: epath.Path) -> None:
    """Raises UserError unless `folder` can be made or is empty, so that nothing is overwritten."""
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{flag}={folder}: {place} is a file, expected a folder")
            break
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{flag}={folder} is not empty; name a new folder")


def _with_found_config(argv: list[str]) -> list[str]:
    """The command line with the path of the configuration file as `config.find_file` has it, and what keys imply.

    A configuration file may have `IMPLIED`, arguments by key: where the command line sets the key and does not give the
    argument, the argument holds. A network that is named for images, for one, is not meant for features of a backbone.
    """
    found = []
    for argument in argv:
        if argument.startswith("--config="):
            path, _, arguments = argument.removeprefix("--config=").partition(":")
            file = config_lib.find_file(path)
            implied = runpy.run_path(file).get("IMPLIED", {}) if os.path.exists(file) else {}
            given = [part.partition("=")[0].strip() for part in arguments.split(",")]
            for key, addition in implied.items():
                is_set = any(other.startswith(f"--config.{key}=") for other in argv)
                if is_set and addition.partition("=")[0] not in given:
                    arguments = ",".join(filter(None, (arguments, addition)))
            argument = f"--config={file}" + (f":{arguments}" if arguments else "")
        found.append(argument)
    return found


def _parse(argv: list[str], positional: int | None) -> list[str]:
    argv = _with_found_config(argv)
    if not any(argument.startswith(("--verbosity", "-v")) for argument in argv):
        logging.set_verbosity(logging.WARNING)
    try:
        arguments = flags.FLAGS(argv)
    except SystemExit as stop:
        # absl exits with status 1 even after help that was asked for.
        sys.exit(0 if any(argument.lstrip("-").startswith(("help", "?")) for argument in argv[1:]) else stop.code)
    except Exception as error:
        # The libraries' own message about a mistake in --config can be obscure, so this looks for such a mistake first.
        _check_overrides(argv)
        raise UserError(str(error)) from None
    _check_overrides(argv)
    if any("gs://" in argument for argument in argv):
        buckets.prepare(argv)
    if positional is not None and len(arguments) > 1 + positional:
        raise UserError(f"unexpected arguments {arguments[1 + positional :]}; options begin with --")
    return arguments


def _check_overrides(argv: list[str]) -> None:
    """Raises UserError for a configuration that does not load, and for the first --config.key that does not exist."""
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
