"""A gcloud that knows TPU VMs, queued resources, clusters and node pools, and keeps them in the directory $FAKE_CLOUD.

It writes every call to `calls`. Tests prepare three things there:
  failures/WORDS  lines; each call of that command (words joined by "-") takes one away and fails with it; an empty one
                  lets it pass
  queue           lines; states of one request, "A B C": describe walks through them and stays at the last
  workers         lines; what one `worker.sh status` prints, words separated by blanks; the last one stays
With a directory `machine` there, ssh and scp truly run and copy, at home in it.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["FAKE_CLOUD"])


def take(path: Path, keep_last: bool) -> str | None:
    """The first line of a file, which loses it."""
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return None
    if not (keep_last and len(lines) == 1):
        path.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0]


def stop(message: str) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(1)


def thing(kind: str, name: str) -> Path:
    return HERE / kind / name


def create(kind: str, name: str, states: str) -> None:
    if thing(kind, name).exists():
        stop(f"ALREADY_EXISTS: {name}")
    thing(kind, name).parent.mkdir(exist_ok=True)
    thing(kind, name).write_text("".join(f"{state}\n" for state in states.split()))


def describe(kind: str, name: str) -> None:
    state = take(thing(kind, name), keep_last=True)
    if state is None:
        stop(f"NOT_FOUND: Resource '{name}' was not found")
    print(state)


def delete(kind: str, name: str) -> None:
    if not thing(kind, name).exists():
        stop(f"NOT_FOUND: Resource '{name}' was not found")
    thing(kind, name).unlink()


def on_machine(words: list[str]) -> int:
    """ssh or scp to the machine that is there."""
    home = HERE / "machine"
    match words[3:]:
        case ["ssh", _]:
            command = next(word for word in sys.argv if word.startswith("--command=")).removeprefix("--command=")
            return subprocess.run(["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}).returncode
        case ["scp", source, target]:
            shutil.copy(source, home / target.partition(":")[2])
    return 0


def main() -> None:
    with open(HERE / "calls", "a") as calls:
        print(shlex.join(["gcloud", *sys.argv[1:]]), file=calls)
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    verb = words[:4] if words[0] == "compute" else words[:3]
    if failure := take(HERE / "failures" / "-".join(verb), keep_last=False):
        stop(failure)
    if words[3:4] in (["ssh"], ["scp"]) and (HERE / "machine").is_dir():
        sys.exit(on_machine(words))
    match words:
        case ["compute", "tpus", "tpu-vm", "create", name]:
            create("tpu-vm", name, "READY")
        case ["compute", "tpus", "queued-resources", "create", name]:
            create("queued", name, take(HERE / "queue", keep_last=False) or "ACTIVE")
        case ["compute", "tpus", "tpu-vm", "describe", name]:
            describe("tpu-vm", name)
        case ["compute", "tpus", "queued-resources", "describe", name]:
            describe("queued", name)
        case ["compute", "tpus", "tpu-vm", "delete", name]:
            delete("tpu-vm", name)
        case ["compute", "tpus", "queued-resources", "delete", name]:
            delete("queued", name)
        case ["compute", "tpus", "tpu-vm", "ssh", _]:
            command = next(word for word in sys.argv if word.startswith("--command="))
            if "worker.sh status" in command:
                print("\n".join((take(HERE / "workers", keep_last=True) or "idle").split()))
        case ["compute", "tpus", "tpu-vm", "scp", *_] | ["container", "clusters", "get-credentials", _]:
            pass
        case ["container", kind, "create", name]:
            create(kind, name, "RUNNING")
        case ["container", kind, "describe", name]:
            describe(kind, name)
        case _:
            stop(f"the fake does not know {words}")


main()
