"""A server for tests of `experts up`, started as a script: PORT MARK [BEHAVIOUR ...].

It answers /v1/models once it has loaded, /pid with its process, and has a child of its own, as servers of models do.
The mark is on the command line of both, to find them by. Behaviours: "slow" answers 503 at first, "stubborn" ignores
SIGTERM, "dies" ends at once, "0.0.0.0" listens to other machines.
"""

import http.server
import os
import signal
import subprocess
import sys

CHILD = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"


class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        Handler.asked += 1
        loading = "slow" in sys.argv and Handler.asked < 3
        self.send_response(503 if loading else 200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())


def main() -> None:
    port, mark, *behaviour = sys.argv[1:]
    if "dies" in behaviour:
        sys.exit("no memory left on the device")
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    host = next((word for word in behaviour if word.startswith("0.")), "127.0.0.1")
    server = http.server.HTTPServer((host, int(port)), Handler)
    subprocess.Popen([sys.executable, "-c", CHILD, mark])
    server.serve_forever()


if __name__ == "__main__":
    main()
