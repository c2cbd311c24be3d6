"""The worker's end of the line: commands as JSON lines on standard input, answers as JSON lines on standard output.

`{"command": "step", ...arguments}` → `{"result": ..., "idle_cpu": seconds}` or `{"error": traceback}`. Arrays travel in
files that arguments name. `idle_cpu` is the processor time that went by since the last answer, in which there was
nothing to do: threads that spin while they wait would slow the other side down.
"""

import json
import os
import sys
import time
import traceback


def serve(peer: object) -> None:
    """Answers commands, the public methods of `peer`, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not come between the answers
    answered = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - answered
        arguments = json.loads(line)
        try:
            answer = {"result": getattr(peer, arguments.pop("command"))(**arguments), "idle_cpu": idle}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        answered = time.process_time()
