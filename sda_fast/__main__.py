"""`python -m sda_fast`: the program `sda-fast`, for launchers that start modules."""

import sys

from sda_fast.cli import main

sys.exit(main())
