"""`python -m chordal` is the command line."""

from __future__ import annotations

import sys

from chordal.cli import main

sys.exit(main())
