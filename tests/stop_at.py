"""`python stop_at.py STEP <flags of ieg_jax.main>`: a run that is asked to stop at a step, as SIGTERM would."""

import sys

from ieg_jax import cli, main
from ieg_jax.runtime import processes

if __name__ == "__main__":
    main.define_flags()
    step = int(sys.argv.pop(1))
    processes.StopRequest.requested = lambda self, now: now >= step
    cli.run(main.main)
