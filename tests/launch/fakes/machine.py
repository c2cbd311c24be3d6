"""One machine with a service manager: systemd-run, systemctl and journalctl that truly run and signal one process.

    machine.py systemd-run|systemctl|journalctl ...       as worker.sh calls them
    machine.py watch COMMAND...                           the service itself: keeps its exit code

State is in $FAKE_CLOUD/machine, which a test deletes when the machine is "taken away".
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["FAKE_CLOUD"]) / "machine"
UNIT, PID, LOG = HERE / "unit", HERE / "pid", HERE / "log"


def main() -> None:
    words = [word for word in sys.argv[2:] if not word.startswith("--")]
    match sys.argv[1], words:
        case "systemd-run", [first, *_]:
            command = sys.argv[sys.argv.index(first) :]  # behind systemd-run's own flags
            keep = {name: os.environ[name] for name in ("PATH", "HOME", "FAKE_CLOUD")}
            keep["JAX_PLATFORMS"] = "cpu"  # there is no TPU
            watch = [sys.executable, "-I", "-S", __file__, "watch", *command]
            UNIT.write_text("LoadState=loaded\nSubState=running\n")
            subprocess.Popen(watch, cwd=HERE / "maestro", env=keep, start_new_session=True, stdout=subprocess.DEVNULL)
        case "watch", _:
            with open(LOG, "ab") as log:
                process = subprocess.Popen(sys.argv[2:], stdout=log, stderr=log)
            PID.write_text(str(process.pid))
            code = process.wait()
            if HERE.exists():  # else nobody is left to be told
                killed = code < 0
                UNIT.write_text(
                    f"LoadState=loaded\nSubState={'failed' if code else 'exited'}\n"
                    f"ExecMainCode={2 if killed else 1}\nExecMainStatus={abs(code)}\n"
                )
        case "systemctl", ["show", _]:
            name = next(word for word in sys.argv if word.startswith("--property=")).removeprefix("--property=")
            found = dict(line.split("=") for line in UNIT.read_text().splitlines()) if UNIT.exists() else {}
            print(found.get(name, "not-found" if name == "LoadState" else "0"))
        case "systemctl", ["stop", _] if UNIT.exists() and "running" in UNIT.read_text():
            os.kill(int(PID.read_text()), signal.SIGTERM)
            while "running" in UNIT.read_text():
                time.sleep(0.1)
        case "systemctl", ["stop" | "reset-failed", _]:
            UNIT.unlink(missing_ok=True)
        case "journalctl", _:
            print(LOG.read_text())
        case _:
            sys.exit(f"the machine does not know {sys.argv[1:]}")


main()
