"""A program that fails with one line of $FAKE_CLOUD/holds after the other, while there are some."""

import os
import sys
from pathlib import Path

HOLDS = Path(os.environ["FAKE_CLOUD"]) / "holds"

first, _, rest = HOLDS.read_text().partition("\n")
HOLDS.write_text(rest)
sys.exit(first or None)
