"""A kubectl that knows JobSets and queues, and keeps them in the directories $FAKE_CLOUD/jobset and clusterqueue.

A file there holds a JobSet's terminal state: empty while it runs. `pods` holds names of pods, oldest first. Applied
manifests go to `applied`, calls to `calls`; `failures/kubectl-VERB` holds lines of which each call takes one away and
fails with it.
"""

import os
import re
import shlex
import sys
from pathlib import Path

HERE = Path(os.environ["FAKE_CLOUD"])


def stop(message: str) -> None:
    print(f"Error from server: {message}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    with open(HERE / "calls", "a") as calls:
        print(shlex.join(["kubectl", *sys.argv[1:]]), file=calls)
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    failures = HERE / "failures" / f"kubectl-{words[0]}"
    if failures.exists() and (lines := failures.read_text().splitlines()):
        failures.write_text("".join(f"{line}\n" for line in lines[1:]))
        stop(lines[0])
    (HERE / "jobset").mkdir(exist_ok=True)
    (HERE / "clusterqueue").mkdir(exist_ok=True)
    match words:
        case ["apply"] if "--filename=-" in sys.argv:
            text = sys.stdin.read()
            (HERE / "applied").write_text(text)
            kinds = r"^kind: (JobSet|ClusterQueue)\nmetadata:\n  name: (\S+)$"
            for kind, name in re.findall(kinds, text, re.MULTILINE):
                (HERE / kind.lower() / name).touch()
        case ["apply"] | ["wait", "deployment"]:
            pass
        case ["get", "jobset", name]:
            if not (HERE / "jobset" / name).exists():
                stop(f'(NotFound): jobsets.jobset.x-k8s.io "{name}" not found')
            print(name, (HERE / "jobset" / name).read_text().strip())
        case ["get", "clusterqueue", name]:
            if not (HERE / "clusterqueue" / name).exists():
                stop(f'(NotFound): clusterqueues.kueue.x-k8s.io "{name}" not found')
            print(name)
        case ["get", "pods"]:
            print("".join(f"pod/{line}\n" for line in (HERE / "pods").read_text().split()), end="")
        case ["logs", _]:
            pass
        case ["delete", "jobset", name]:
            (HERE / "jobset" / name).unlink(missing_ok=True)
        case _:
            stop(f"the fake does not know {words}")


main()
