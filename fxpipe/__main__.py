"""``python -m fxpipe`` is the ``fxpipe`` command."""

import sys

from fxpipe.cli import main

sys.exit(main())
