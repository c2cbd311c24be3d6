"""Waiting for experts: our scheduler against TRL's loops on the same scripted episodes.

`benchmarks/rollout.py` runs this. Times are those of a run divided by 20: a step of decoding takes 0.6 ms (12 ms), an
expert 0.15 s on average and 0.75 s at the 99th percentile (3 s, 15 s; log-normal). A real HTTP server on 127.0.0.1, in
a process of its own, replays the latencies of a trace (`expert_server.py`).

| measure | theirs |
|---|---|
| S1 | TRL's `GRPOTrainer._generate` with its `_tool_call_loop`; the tool is a function |
| S1_coroutines | the same; the tool is a coroutine function |
| S1_worker | TRL's experimental async worker (`async_grpo/async_rollout_worker.py`), until all groups are scored |

8 groups of 8 members, 1 to 4 calls each, one trace a pair. All sides write the same numbers of tokens a turn in the
same order, ask the same server the same calls and read the same replies; that they did is checked in every run.

* Decoding: a step takes its time for any number of rows. TRL's loop generates for the longest turn of its batch; the
  async worker posts to a scripted endpoint in place of vLLM's, which spends a step a token for each request, any number
  side by side; our engine decodes in 64 lanes, its programs run truly, and its exchange waits for what is left of a
  chunk's time: programs are queued for a device, so what the host does meanwhile costs nothing. Reading a prompt or an
  observation costs nothing on any side but the host's own work.
* TRL's loop and worker render, tokenise and parse with their Qwen3 chat template, as they ship; logits, rewards and
  training are left out. The worker goes on with further groups by itself; the endpoint holds those.
* Not in the seconds, on all sides: imports, compilation, connections (kept from two warm-up runs, or opened before the
  clock starts). Ours are from the call of `Engine.rollout` to its return. Every second trace runs in the other order;
  the two fast sides run three times a trace and count with their medians.
* The bound of a trace is what no scheduler goes below: all tokens over 64 lanes, or the slowest episode's own steps and
  latencies, whichever is longer.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import scripted
from benchmarks.expert_server import ServerProcess
from benchmarks.pairs import MismatchError, Result
from benchmarks.peers import environment
from benchmarks.peers.worker import Worker
from benchmarks.scripted import ScriptedRollouts
from benchmarks.traces import Latency, Load, Trace, draw_trace, latency_table, totals
from maestro_jax.observe.progress import Progress
from maestro_jax.rollout.engine import EngineConfig

STEP_SECONDS = 0.6e-3
REPEATS = 3  # of the fast sides, a trace
WARM_UP = 2  # runs of every side, with experts that answer almost at once

_CALLS = (0.37, 0.31, 0.19, 0.13)  # probabilities of 1 to 4
FULL = Load(groups=8, members=8, calls=_CALLS, turn_tokens=(32, 104), latency=Latency(mean=0.15, p99=0.75))
TOY = dataclasses.replace(FULL, groups=2, members=2, latency=Latency(mean=0.02, p99=0.1))
AT_ONCE = Latency(mean=0.002, p99=0.004)
_OBSERVATION = 48  # tokens that an observation takes at most, frame included
_PAGE = 128  # the room is a multiple, so that pages are as large as they get


# ---- S1 ------------------------------------------------------------------------------------------------------


def run_s1(progress: Progress, pairs: int, smoke: bool) -> dict[str, Result]:
    """S1, S1_coroutines and S1_worker.

    Args:
      pairs: how many traces.

    Raises:
      MismatchError: a side did not run the scripted episodes.
    """
    load = TOY if smoke else FULL
    with ExitStack() as stack:
        sides = Sides(load, stack, progress)
        traces = [draw_trace(load, seed) for seed in range(pairs)]
        measured = [sides.run_all(trace) for trace in _shown(traces, progress)]
    bounds = [trace.bound(STEP_SECONDS, len(trace.episodes)) for trace in traces]
    details = {
        "traces": totals(traces),
        "bound_seconds": bounds,
        "over_bound": {
            name: [seconds[name] / bound for seconds, bound in zip(measured, bounds, strict=True)]
            for name in ("ours", "worker")
        },
        "step_seconds": STEP_SECONDS,
        "engine": dataclasses.asdict(sides.ours.config),
        "peer": sides.peer,
    }
    details["over_bound_median"] = {name: statistics.median(of) for name, of in details["over_bound"].items()}
    return {
        measure: Result(_OURS, what, [(seconds["ours"], seconds[side]) for seconds in measured], details)
        for measure, (side, what) in _THEIRS.items()
    }


_OURS = "Engine.rollout: 64 lanes, exchange and scheduler as in a run, the scripted policy, decoding paced"
_LOOP = "GRPOTrainer._generate with _tool_call_loop, a stub engine paced alike, the tool a"
_THEIRS = {
    "S1": ("functions", f"{_LOOP} function"),
    "S1_coroutines": ("coroutines", f"{_LOOP} coroutine function"),
    "S1_worker": ("worker", "_AsyncRolloutLoop, a scripted endpoint paced alike, the tool a coroutine function"),
}


def _shown(traces: Sequence[Trace], progress: Progress) -> Iterator[Trace]:
    progress.phase("S1: traces", len(traces))
    for done, trace in enumerate(traces):
        yield trace
        progress.update(done + 1, {"calls": len(trace.latencies)})


class Sides:
    """Everybody who runs traces, warmed up; all end with the stack."""

    def __init__(self, load: Load, stack: ExitStack, progress: Progress):
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        self._server = stack.enter_context(ServerProcess())
        tokens = scripted.make_tokens(Path(directory))
        self.ours = ScriptedRollouts(tokens, self._server.port, engine_config(load), load.members, STEP_SECONDS)
        stack.callback(self.ours.close)
        requirements = Path(environment.__file__).with_name("trl.txt")
        python = environment.python(requirements, Path(environment.PEERS.value), progress)
        self._worker = stack.enter_context(Worker(python, "benchmarks.peers.trl_tools_worker"))
        progress.phase("S1: warm-up", 1 + WARM_UP)
        self.peer = self._worker.call(
            "prepare", tokenizer=directory, port=self._server.port, groups=load.groups, members=load.members
        )
        progress.update(1, {})
        for run in range(WARM_UP):
            self.run_all(draw_trace(dataclasses.replace(load, latency=AT_ONCE), seed=1000 + run))
            progress.update(2 + run, {})

    def run_all(self, trace: Trace) -> dict[str, float]:
        """Seconds of every side, of the fast ones the median."""
        order = ["functions", "coroutines", *["ours", "worker"] * REPEATS]
        seconds: dict[str, list[float]] = {}
        for side in order if trace.seed % 2 == 0 else order[::-1]:
            seconds.setdefault(side, []).append(self._run(side, trace))
        return {side: statistics.median(found) for side, found in seconds.items()}

    def _run(self, side: str, trace: Trace) -> float:
        self._server.replay(latency_table(trace))
        if side == "ours":
            seconds = self.ours.run(trace)
        else:
            seconds = self._run_theirs(side, trace)
        if sorted(self._server.served()) != sorted(latency_table(trace)):
            raise MismatchError(f"{side}: the calls that the server got are not those of trace {trace.seed}")
        return seconds

    def _run_theirs(self, side: str, trace: Trace) -> float:
        outcome = self._worker.call("run", side=side, trace=dataclasses.asdict(trace), step_seconds=STEP_SECONDS)
        found = outcome["tokens"], outcome["observations"]
        if found != (trace.tokens, len(trace.latencies)):
            raise MismatchError(
                f"{side}: {found[0]} tokens and {found[1]} observations of trace {trace.seed}, "
                f"not {trace.tokens} and {len(trace.latencies)}"
            )
        return outcome["seconds"]


def engine_config(load: Load) -> EngineConfig:
    """Chunks as in `configs/quickstart.py`, room for the longest episode, and for as many replies as come at a time."""
    longest = load.turn_tokens[1]
    room = longest * (len(load.calls) + 1) + _OBSERVATION * len(load.calls)
    return EngineConfig(
        lanes=0,
        decode_chunk=8,
        turn_budget=longest,
        room=-(-room // _PAGE) * _PAGE,
        append_rows=4,
        prefill_groups=0,
        parked_tokens=0,
        parked_on_host=0,
        temperature=1.0,
    )
