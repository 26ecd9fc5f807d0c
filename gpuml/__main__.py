"`python -m gpuml` is the `gpuml` command"

import sys

from gpuml import command

if __name__ == "__main__":
    sys.exit(command())
