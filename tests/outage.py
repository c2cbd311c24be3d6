"""An expert server that goes away and comes back, for runs that are started as commands, and a config that names it."""

import http.server
import json
import threading
import zlib
from typing import Any

CONFIG = """
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    served = {{"endpoints": ({url!r},), "model": "m", "deterministic": False}}
    kept = ("name", "description", "price_prompt", "price_completion")
    experts = config.registry.experts
    config.registry.experts = tuple({{key: one[key] for key in kept}} | served for one in experts)
    return config
"""


class Server:
    """Answers chat completions with a digit that depends on the words of the request only.

    Attributes:
      url: of its API; the port stays its own while it is away.
      answered: requests so far.
      refuses: the HTTP status that it answers with instead, if any.
    """

    def __init__(self) -> None:
        self.answered, self.refuses = 0, 0
        self._port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(outer.refuses or 200)
                self.end_headers()
                self.wfile.write(b"{}" if outer.refuses else json.dumps(outer.completion(json.loads(body))).encode())

            def do_GET(self) -> None:
                self.send_response(404)
                self.end_headers()

            def log_message(self, *told: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def completion(self, asked: Any) -> dict[str, Any]:
        self.answered += 1
        text = str(zlib.crc32(str(asked["messages"][-1]).encode()) % 10)
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return {"choices": [{"message": {"content": text}}], "usage": usage}
