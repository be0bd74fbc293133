"""`python stop_at.py STEP <flags of ieg_jax.main>`: a run that is asked to stop at a step, as SIGTERM would."""

import sys

from ieg_jax import cli, distributed, main

if __name__ == "__main__":
    step = int(sys.argv.pop(1))
    distributed.StopRequest.requested = lambda self, now: now >= step
    cli.run(main.main)
