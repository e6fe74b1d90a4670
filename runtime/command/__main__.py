"""`python -m bonnx.runtime.command` is `bonnx`."""

import sys

from . import main

sys.exit(main())
