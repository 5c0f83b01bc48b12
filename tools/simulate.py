"""The simulated cluster as a command; see tests/support/simulation.py.

python tools/simulate.py 1000        # that many histories, from seed 0
python tools/simulate.py --trace 17  # what happens in one
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.simulation import main

if __name__ == "__main__":
    sys.exit(main())
