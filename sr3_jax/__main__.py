"""`python -m sr3_jax COMMAND` is `sr3 COMMAND`."""

import sys

from sr3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
