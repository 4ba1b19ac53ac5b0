"""`python -m xinslm` is the command line."""

import sys

from xinslm.cli.main import main

sys.exit(main())
