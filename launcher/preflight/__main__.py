"""`python -m launcher.preflight check FOLDER …`: what each node runs; see `node.py`."""

import os
import sys

from launcher.preflight.node import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
