"""`python export.py` is `bonnx export`."""

import sys

from bonnx.__main__ import main

sys.argv.insert(1, "export")
sys.exit(main())
