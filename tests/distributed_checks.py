"""What test_distributed.py runs as two processes: each check of `distributed` once, results as one line of JSON."""

import json
import pathlib
import sys

import jax
from etils import epath

from ieg_jax.errors import UserError
from ieg_jax.runtime import processes


def message(function, *arguments):
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


def fail_on_one(where):
    with processes.together():
        if jax.process_index() == where:
            raise UserError(f"no such file on {where}")


def main():
    base = pathlib.Path(sys.argv[1])
    flags = dict(argument.removeprefix("--").split("=") for argument in sys.argv[2:])
    processes.initialize(flags["coordinator"], int(flags["num_processes"]), int(flags["process_id"]))
    process = jax.process_index()
    print(
        "RESULT"
        + json.dumps(
            {
                "processes": jax.process_count(),
                "devices": len(jax.devices()),
                "exchanged": processes.exchange("ωλ" * process),
                "from_first": processes.from_first(f"I am {process}"),
                "empty": processes.from_first(""),
                "together": message(fail_on_one, 1),
                "nobody fails": message(fail_on_one, 7),
                "same": message(processes.check_same, "the data", "equal"),
                "not the same": message(processes.check_same, "the data", f"of {process}"),
                "shared": message(processes.check_shared, epath.Path(base / "shared"), "--workdir"),
                "not shared": message(processes.check_shared, epath.Path(base / str(process)), "--workdir"),
            }
        )
    )


if __name__ == "__main__":
    processes.VISIBLE_WITHIN = 1.0
    main()
