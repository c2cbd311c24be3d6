"""A worker whose commands show what `protocol.py` and `worker.py` do with them."""

import os
import sys
import threading
import time

from benchmarks.peers.protocol import serve


class Echo:
    def echo(self, value: object) -> object:
        print("not an answer")
        return value

    def fail(self) -> None:
        raise ValueError("no such luck")

    def die(self) -> None:
        sys.stderr.write("first word\nlast words\n")
        sys.stderr.flush()
        os._exit(1)

    def spin(self) -> None:
        """Keeps a core busy after the answer."""
        threading.Thread(target=self._busy, daemon=True).start()

    def _busy(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass


if __name__ == "__main__":
    serve(Echo())
