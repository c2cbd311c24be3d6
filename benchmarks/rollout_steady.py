"""A steady supply of episodes: lanes that are released while experts work, against lanes that are held.

`benchmarks/rollout.py` runs this. Scripted groups wait in the queue for as long as anybody looks; 16 lanes, and room to
park what 3.4 times as many trajectories hold. The experts are those of `rollout_schedule.py`.

| measure | times |
|---|---|
| steady | those of a run divided by 20: steps of 0.6 ms, experts of 0.15 s and 0.75 s (mean, 99th percentile) |
| steady_real_time | those of a run: steps of 12 ms, experts of 3 s and 15 s |

Theirs is the same engine with the same groups and no room to park. The ceiling is ours with experts that answer almost
at once: what this engine does when nobody waits. Utilisation is tokens decoded over what the lanes
could have decoded in the same time; seconds are those per 1,000 tokens. What keeps it below 1 with released lanes: a
lane that stops within a chunk idles to its end (`chunk_fill`), and no lane decodes while the host exchanges with the
experts, which takes its own time however the others are divided.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import scripted
from benchmarks.expert_server import ServerProcess
from benchmarks.pairs import Result
from benchmarks.rollout_schedule import AT_ONCE, FULL, STEP_SECONDS, TOY, engine_config
from benchmarks.scripted import Chunk, ScriptedRollouts
from benchmarks.traces import Latency, Load, Trace, draw_trace, latency_table
from maestro_jax.observe.progress import Progress
from maestro_jax.rollout.engine import EngineConfig
from maestro_jax.rollout.state import Lane
from maestro_jax.rollout.trajectory import GroupRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WARM_UP = 100  # chunks, in which everything compiles


@dataclasses.dataclass(frozen=True)
class Steady:
    """A supply of groups that does not end, as far as anybody looks.

    Attributes:
      load: with turns so long that held lanes decode a third of the time.
      slots: groups that may run at a time, more than lanes and room for parked ones can take.
      in_flight: trajectories that lanes and room for parked ones hold, as a multiple of the lanes.
      warm_in: chunks that are decoded before the clock starts.
      seconds: how long it runs.
    """

    load: Load
    step_seconds: float
    decode_chunk: int
    lanes: int
    slots: int
    in_flight: float
    warm_in: int
    seconds: float

    @property
    def config(self) -> EngineConfig:
        """Of the engine, without room to park."""
        return dataclasses.replace(
            engine_config(self.load),
            lanes=self.lanes,
            decode_chunk=self.decode_chunk,
            append_rows=0,
            prefill_groups=2,
        )


_LOAD = dataclasses.replace(FULL, groups=240, turn_tokens=(32, 140))
SCALED = Steady(_LOAD, STEP_SECONDS, 8, lanes=16, slots=20, in_flight=4.4, warm_in=300, seconds=6.0)
REAL_TIME = dataclasses.replace(
    SCALED,
    load=dataclasses.replace(_LOAD, groups=120, latency=Latency(mean=3.0, p99=15.0)),
    step_seconds=20 * STEP_SECONDS,
    decode_chunk=4,  # a lane that stops idles for half of it, on average
    warm_in=120,
    seconds=25.0,
)
_TOY_LOAD = dataclasses.replace(TOY, groups=60)
SMALL = Steady(_TOY_LOAD, STEP_SECONDS, 8, lanes=4, slots=8, in_flight=4.4, warm_in=30, seconds=0.3)


def run_steady(progress: Progress, pairs: int, smoke: bool, picture: Path | None = None) -> dict[str, Result]:
    """steady and, once, steady_real_time.

    Args:
      pairs: how often each side of `steady` is measured, each time with another trace.
      picture: a PNG file for what the lanes did in the last pair of `steady`.

    Raises:
      ValueError: a trace was over before the clock stopped.
    """
    timed = {"steady": _take_turns("steady", SMALL if smoke else SCALED, pairs, progress)}
    if picture is not None:
        released, held, _ = timed["steady"][-1]
        plot_timeline({"lanes released": released, "lanes held": held}, picture)
    if not smoke:
        timed["steady_real_time"] = _take_turns("steady_real_time", REAL_TIME, 1, progress)
    return {name: _result(stretches) for name, stretches in timed.items()}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What the lanes did while the clock ran; times in seconds since its start.

    Attributes:
      fill: share of a chunk's steps that its lanes used; the rest is lanes that stopped before its end.
      in_flight: trajectories that had begun and not ended, on average.
      history: until when lanes had been what, int32 `[S]` of `Lane`.
    """

    shape: Steady
    seconds: float
    chunks: list[Chunk]
    in_flight: float
    history: list[tuple[float, np.ndarray]]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def fill(self) -> float:
        return self.tokens / (len(self.chunks) * self.shape.lanes * self.shape.decode_chunk)

    @property
    def utilisation(self) -> float:
        """Tokens decoded, of those that the lanes could have decoded in the time."""
        return self.tokens * self.shape.step_seconds / (self.shape.lanes * self.seconds)


Turn = tuple[Stretch, Stretch, Stretch]  # lanes released, lanes held, lanes whose experts answer at once


def _take_turns(name: str, shape: Steady, pairs: int, progress: Progress) -> list[Turn]:
    """Lanes released, held and never waiting, warmed up; every second pair runs in the other order."""
    rooms = int((shape.in_flight - 1) * shape.lanes * shape.config.room), 0
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(ServerProcess())
        tokens, members, sides = scripted.make_tokens(Path(directory)), shape.load.members, []
        for room in rooms:
            config = dataclasses.replace(shape.config, parked_tokens=room)
            side = ScriptedRollouts(tokens, server.port, config, members, shape.step_seconds)
            stack.callback(side.close)
            sides.append(side)
        progress.phase(name, pairs + 1)
        for side in sides:
            run_session(side, server, draw_trace(shape.load, 0), dataclasses.replace(shape, warm_in=_WARM_UP), 0.0)
        progress.update(1, {})
        timed = []
        for number in range(1, pairs + 1):
            trace, found = draw_trace(shape.load, number), {}
            for at in (0, 1) if number % 2 else (1, 0):
                found[at] = measure(sides[at], server, trace, shape)
            at_once = draw_trace(dataclasses.replace(shape.load, latency=AT_ONCE), number)
            ceiling = measure(sides[0], server, at_once, shape)
            timed.append((found[0], found[1], ceiling))
            own, other, most = (stretch.utilisation for stretch in timed[-1])
            progress.update(number + 1, {"utilisation": own, "held": other, "ceiling": most})
    return timed


def measure(side: ScriptedRollouts, server: ServerProcess, trace: Trace, shape: Steady) -> Stretch:
    """What the lanes do with a trace.

    Raises:
      ValueError: the trace was over before the clock stopped.
    """
    records, start = run_session(side, server, trace, shape, shape.seconds)
    end = start + shape.seconds
    if any(member.timing.assigned for member in records[-1].members):
        raise ValueError(f"the last of {len(records)} groups had begun when the clock stopped; draw more groups")
    chunks = [c for c in side.engine.chunks if start < c.end <= end]
    return Stretch(
        shape,
        seconds=chunks[-1].end - start,
        chunks=[dataclasses.replace(c, start=c.start - start, end=c.end - start) for c in chunks],
        in_flight=_mean_in_flight(records, start, end),
        history=[(at - start, status) for at, _, status in side.exchange.history if start <= at <= end],
    )


def run_session(
    side: ScriptedRollouts, server: ServerProcess, trace: Trace, shape: Steady, seconds: float
) -> tuple[list[GroupRecord], float]:
    """Runs a trace for so long behind its warm-in; what still runs then is dropped.

    Returns:
      The groups, and when (`time.monotonic`) the warm-in was over.
    """
    server.replay(latency_table(trace))
    session, records, params = side.session(trace, shape.slots)
    chunks = side.engine.chunks
    chunks.clear()
    for _ in session.run(params, version=0):
        if len(chunks) > shape.warm_in and time.monotonic() > chunks[shape.warm_in].end + seconds:
            break
    return records, chunks[shape.warm_in].end


def _mean_in_flight(records: Sequence[GroupRecord], start: float, end: float) -> float:
    """Trajectories between their first lane and their end, averaged over the time between `start` and `end`."""
    begun = [m.timing for record in records for m in record.members if m.timing.assigned]
    overlaps = (min(t.finished or end, end) - max(t.assigned, start) for t in begun)
    return sum(max(0.0, overlap) for overlap in overlaps) / (end - start)


def _result(timed: Sequence[Turn]) -> Result:
    def each(name: str) -> dict[str, list[float]]:
        """A figure of all sides, in every turn."""
        return {
            side: [getattr(turn[at], name) for turn in timed] for at, side in enumerate(("released", "held", "ceiling"))
        }

    def of_ceiling(at: int) -> float:
        return statistics.median(turn[at].utilisation / turn[2].utilisation for turn in timed)

    shape = timed[0][0].shape
    details = {
        "utilisation": {side: statistics.median(found) for side, found in each("utilisation").items()},
        "utilisation_pairs": each("utilisation"),
        "of_ceiling": {"released": of_ceiling(0), "held": of_ceiling(1)},
        "chunk_fill": each("fill"),
        "in_flight": each("in_flight"),
        "step_seconds": shape.step_seconds,
        "latency": dataclasses.asdict(shape.load.latency),
        "engine": dataclasses.asdict(shape.config),
        "in_flight_room": shape.in_flight * shape.lanes,
    }
    thousands = [(1000 * ours.seconds / ours.tokens, 1000 * held.seconds / held.tokens) for ours, held, _ in timed]
    return Result(_RELEASED, _HELD, thousands, details)


_RELEASED = "lanes whose trajectory waits for an expert go to another one; seconds per 1,000 tokens"
_HELD = "the same engine without room to park: such lanes are held; seconds per 1,000 tokens"


# ---- the picture ---------------------------------------------------------------------------------------------

# Okabe-Ito: told apart by colour-blind readers too.
_DECODING, _WAITING, _EMPTY = "#0072B2", "#E69F00", "#BBBBBB"
_LEGEND = {
    _DECODING: "decodes",
    _WAITING: "held by a trajectory that waits",
    _EMPTY: "empty",
    "white": "the host's turn",
}
_SHOWN_SECONDS = 1.0


def plot_timeline(stretches: Mapping[str, Stretch], path: Path) -> None:
    """Draws what every lane did for a second, one panel a stretch.

    Waiting and empty lanes are those of the engine's own record of exchanges; decoding is what each lane wrote in each
    chunk.
    """
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, panels = pyplot.subplots(len(stretches), 1, sharex=True, figsize=(9.8, 1.4 + 2.2 * len(stretches)))
    for axes, (title, stretch) in zip(np.atleast_1d(panels), stretches.items(), strict=True):
        _draw_lanes(axes, stretch)
        axes.set_title(f"{title}: {100 * stretch.utilisation:.0f} % of what they could decode", loc="left")
        axes.set_ylabel("lane")
        axes.set_xlabel(f"seconds; a step takes {1000 * stretch.shape.step_seconds:g} ms")
    handles = [Patch(facecolor=colour, edgecolor="grey", label=kind) for colour, kind in _LEGEND.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_lanes(axes: "Axes", stretch: Stretch) -> None:
    until = [at for at, _ in stretch.history]
    spans = list(zip([0.0, *until], until, (status for _, status in stretch.history), strict=False))
    for lane in range(stretch.shape.lanes):
        for colour, kind in ((_WAITING, Lane.WAITING), (_EMPTY, Lane.EMPTY)):
            bars = [(a, b - a) for a, b, status in spans if status[lane] == kind]
            axes.broken_barh(bars, (lane, 0.9), color=colour, linewidth=0)
        steps = [(c.start, int(c.written[lane]) * stretch.shape.step_seconds) for c in stretch.chunks]
        axes.broken_barh([bar for bar in steps if bar[1]], (lane, 0.9), color=_DECODING, linewidth=0)
    axes.set_xlim(0, min(_SHOWN_SECONDS, stretch.seconds))
    axes.set_ylim(stretch.shape.lanes, 0)
    axes.set_yticks(range(0, stretch.shape.lanes, 4))
