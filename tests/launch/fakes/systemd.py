"""systemctl, systemd-run and journalctl for one unit, whose properties are lines in the file $FAKE_CLOUD/unit."""

import os
import sys
from pathlib import Path

UNIT = Path(os.environ["FAKE_CLOUD"]) / "unit"


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    with open(UNIT.with_name("calls"), "a") as calls:
        print(*sys.argv[1:], file=calls)
    properties = dict(line.split("=") for line in UNIT.read_text().splitlines()) if UNIT.exists() else {}
    match words:
        case ["systemctl", "show", _]:
            name = next(word for word in sys.argv if word.startswith("--property=")).removeprefix("--property=")
            print(properties.get(name, "not-found" if name == "LoadState" else "0"))
        case ["systemctl", "stop", _] if properties.get("SubState") == "running":
            UNIT.write_text("LoadState=loaded\nSubState=failed\nExecMainCode=1\nExecMainStatus=75\n")
        case ["systemctl", "stop" | "reset-failed", _]:
            UNIT.unlink(missing_ok=True)
        case ["systemd-run", *_]:
            if UNIT.exists():
                sys.exit("Failed to start transient service unit: Unit maestro.service was already loaded")
            UNIT.write_text("LoadState=loaded\nSubState=running\n")
        case _:
            sys.exit(f"the fake does not know {words}")


main()
