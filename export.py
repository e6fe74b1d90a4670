"""`python export.py` is `bonnx export`."""

import sys

from bonnx.runtime.command import main

sys.exit(main(["export", *sys.argv[1:]]))
