import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent.parent / "launch" / "programs"

# Tasks find their modules where the driver does.
if str(PROGRAMS) not in sys.path:
    sys.path.insert(0, str(PROGRAMS))
