"""A task that counts, writes down how far it got when it is asked to stop, and goes on from there."""

import os
import signal
import sys
import time
from pathlib import Path

INTERVAL_S = 0.1


def count(path: str, last: str) -> None:
    counter = Path(path)
    number = int(counter.read_text() if counter.exists() else "0")
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    print(f"begins at {number} on {os.environ.get('WORLD_SIZE')}", flush=True)
    while number < int(last):
        time.sleep(INTERVAL_S)
        number += 1
        if number % 10 == 0 or asked:
            counter.with_suffix(".new").write_text(str(number))
            counter.with_suffix(".new").rename(counter)
        if asked:
            print(f"stops at {number}", flush=True)
            sys.exit(143)
    counter.write_text(str(number))


if __name__ == "__main__":
    count(*sys.argv[1:])
