"""Several processes as one run: how they find each other, agree, and end.

A run is one process unless this room is told otherwise, in this order:

1. MAESTRO_PROCESSES=n in the environment, with MAESTRO_COORDINATOR=host:port (of process 0) and MAESTRO_PROCESS=i;
   MAESTRO_PROCESSES=1 says that this process is alone, whatever is detected below.
2. A Cloud TPU slice: this machine has TPU chips, and GKE (TPU_WORKER_HOSTNAMES and TPU_WORKER_ID) or the metadata
   server (TPU VMs) names its hosts.
3. A Slurm step of several tasks (`srun`). A batch script, a login shell or `srun --ntasks=1` is one process.

What passes between processes here is small and travels over the coordinator, from host to host: no device takes part,
so that it needs no order among device programs, and signals are heard while a process waits.
"""

import contextlib
import dataclasses
import ipaddress
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the coordinator's key-value store has no public name
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

from maestro_jax.errors import EXIT_LOST, ConfigError, UserError
from maestro_jax.parallel import preemption

T = TypeVar("T")

# A process whose heartbeats stay away so long is lost, and JAX ends all others with SIGABRT. Heartbeats come from a
# thread of their own, whatever Python or the devices do meanwhile.
HEARTBEAT_SECONDS = 10
START_SECONDS = 300  # for all processes to come: hosts are made and images pulled at their own pace
_POLL_MS = 1000
_PORT = 61440  # and the 4096 above it, by Slurm's number of the job
_TPU_PORT = 8482  # of the coordinator on a TPU host; JAX's own choice there

_LOSS = re.compile(r"Gloo \S+ failed|NCCL|UNAVAILABLE")
_STOP = "maestro/stop"
_REFUSED = "$refused"  # tells an error of the user's from what was computed
_exchanges = itertools.count()
_apart: list[bool] = []  # not empty while process 0 computes something on its own


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where this process belongs.

    Attributes:
      name: what told so.
      coordinator: host:port of process 0; None where JAX itself knows (`method`).
      device: the one local device of this process; None: all that it sees.
      method: of `jax.distributed.initialize`.
    """

    name: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    device: int | None = None
    method: str = "deactivate"


def start(environ: Mapping[str, str] = os.environ, seconds: int = START_SECONDS) -> None:
    """Joins the other processes, if there are any and it has not; called before anything else asks JAX for devices.

    A process that waits in vain ends with `EXIT_LOST`, and says who came.

    Raises:
      ConfigError: half of the variables that tell; a port that is taken.
    """
    cluster = find_cluster(environ)
    if cluster is None or several():
        return
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, _, port = (cluster.coordinator or "").rpartition(":")
    try:
        with _patience(cluster, seconds):
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process,
                local_device_ids=cluster.device,
                cluster_detection_method=cluster.method,
                initialization_timeout=2 * seconds,  # ours comes first
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                # The coordinator trusts whoever asks: on one machine, nobody outside may.
                coordinator_bind_address=f"{host}:{port}" if host in ("127.0.0.1", "localhost") else None,
            )
    except jax.errors.JaxRuntimeError as error:
        if "RPC server" not in str(error):
            raise
        address = distributed.global_state.coordinator_address
        raise ConfigError(f"process 0 cannot listen at {address}; give another port to MAESTRO_COORDINATOR") from error
    preemption.listen()  # again: JAX has taken the signals
    preemption.among(_tell_stop, _told_stop, lambda mine: any(gather(mine)))


class LostError(Exception):
    """Another process of the run is gone."""


def find_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """What `start` joins; None for a process on its own."""
    names = ("MAESTRO_COORDINATOR", "MAESTRO_PROCESSES", "MAESTRO_PROCESS")
    if environ.get("MAESTRO_PROCESSES") == "1":
        return None
    if any(name in environ for name in names):
        return _told(*[environ.get(name, "") for name in names])
    platforms = environ.get("JAX_PLATFORMS", "tpu")
    if running_in_cloud_tpu_vm and "tpu" in platforms:
        return _tpu_slice(environ)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in environ:
        return _slurm_step(environ)
    return None


def _told(coordinator: str, processes: str, process: str) -> Cluster:
    cure = "set all of MAESTRO_COORDINATOR=host:port, MAESTRO_PROCESSES=n and MAESTRO_PROCESS=0..n-1, or none of them"
    found = f"MAESTRO_COORDINATOR={coordinator!r}, MAESTRO_PROCESSES={processes!r}, MAESTRO_PROCESS={process!r}"
    if not (re.fullmatch(r"\S+:\d+", coordinator) and processes.isdecimal() and process.isdecimal()):
        raise ConfigError(f"{found}: {cure}")
    if int(process) >= int(processes):
        raise ConfigError(f"{found}: processes count from 0 to {int(processes) - 1}")
    return Cluster("MAESTRO_COORDINATOR", coordinator, int(processes), int(process))


def _tpu_slice(environ: Mapping[str, str]) -> Cluster | None:
    """The hosts that GKE names; on TPU VMs JAX asks the metadata server, where there can be other hosts."""
    if environ.get("TPU_WORKER_HOSTNAMES"):
        return _gke_slice(environ)
    if "TPU_SKIP_MDS_QUERY" in environ:
        return None
    return Cluster("a Cloud TPU slice", method="gcetpu")


def _gke_slice(environ: Mapping[str, str]) -> Cluster | None:
    """Not left to JAX's "gketpu": on a single slice that asks the metadata server, which a pod may not reach.

    (jax-ml/jax#40854: whatever TPU_SKIP_MDS_QUERY says.)
    """
    hosts = environ["TPU_WORKER_HOSTNAMES"].split(",")
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1"))
    if len(hosts) * slices == 1:
        return None
    needed = ["TPU_WORKER_ID"] + (["MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"] if slices > 1 else [])
    if missing := [name for name in needed if not environ.get(name)]:
        raise ConfigError(
            f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts of {slices} slices, but {missing[0]} is not set; GKE does "
            "so for the pods of a JobSet, or set MAESTRO_COORDINATOR, MAESTRO_PROCESSES and MAESTRO_PROCESS"
        )
    first = environ["MEGASCALE_COORDINATOR_ADDRESS"] if slices > 1 else hosts[0]
    process = int(environ["TPU_WORKER_ID"]) + len(hosts) * int(environ.get("MEGASCALE_SLICE_ID", "0"))
    address = f"{first.partition(':')[0]}:{_TPU_PORT}"
    return Cluster("a TPU slice on GKE", address, len(hosts) * slices, process)


def _slurm_step(environ: Mapping[str, str]) -> Cluster:
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    host = first_host(environ["SLURM_STEP_NODELIST"])
    tasks, local = environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(environ["SLURM_LOCALID"])
    # Several tasks of a node share its GPUs, one each, unless Slurm has dealt them out already.
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    alone = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks) is not None
    return Cluster(
        "Slurm",
        f"{host}:{_PORT + (job + step) % 4096}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        device=local if not alone and len(visible) > 1 else None,
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: "node[003-007,12],gpu1" → "node003"."""
    prefix, bracket, rest = nodes.partition("[")
    if "," in prefix or not bracket:
        return prefix.partition(",")[0]
    inside, _, suffix = rest.partition("]")
    return prefix + re.split("[-,]", inside)[0] + suffix.partition(",")[0]


@contextlib.contextmanager
def _patience(cluster: Cluster, seconds: int) -> Iterator[None]:
    """Ends the process with a reason where the block takes longer; JAX would abort with none."""

    def give_up() -> None:
        print(f"error: {_reason(cluster, seconds)}", file=sys.stderr)
        leave(EXIT_LOST)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reason(cluster: Cluster, seconds: int) -> str:
    coordinator = distributed.global_state.coordinator_address or "the coordinator"
    processes = cluster.processes or "the"
    cure = (
        f"start all of them (found by: {cluster.name}), let hosts reach {coordinator}, and unset http_proxy; "
        "MAESTRO_PROCESSES=1 runs on this host alone"
    )
    if distributed.global_state.service is None:
        who = "this process" if cluster.process is None else f"process {cluster.process} of {processes}"
        return f"{who} waited {seconds} s for the others at {coordinator}; {cure}"
    came = _connected(int(coordinator.rpartition(":")[2]))
    return (
        f"{len(came)} of {processes} processes came to {coordinator} within {seconds} s "
        f"(from {', '.join(sorted(set(came)))}); {cure}"
    )


def _connected(port: int) -> list[str]:
    """Addresses of the established connections to a port of this machine; empty where Linux does not tell."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, remote, state, *_ = line.split()
                if int(local.rpartition(":")[2], 16) == port and state == "01":
                    words = re.findall("." * 8, remote.rpartition(":")[0])
                    address = ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words))
                    found.append(str(getattr(address, "ipv4_mapped", None) or address))
    return found


# ---- during the run ----------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def gather(value: T) -> list[T]:
    """Everybody's `value` (plain JSON), in the order of the processes; all of them call it, in the same order."""
    count, me = jax.process_count(), jax.process_index()
    if count == 1 or _apart:
        return [value]
    store, number = _store(), next(_exchanges)
    if me:
        store.key_value_set(f"maestro/{number}/{me}", json.dumps(value))
        return json.loads(_wait_for(f"maestro/{number}/all"))
    others = [json.loads(_wait_for(f"maestro/{number}/{process}")) for process in range(1, count)]
    together = [json.loads(json.dumps(value)), *others]  # the same types for all
    store.key_value_set(f"maestro/{number}/all", json.dumps(together))
    store.key_value_delete(f"maestro/{number - 1}/")  # who is here has read that one
    return together


def joined(parts: Sequence[Sequence[T]]) -> list[T]:
    """Everybody's items of the first part, by process, then of the second, and so on: as one process has them."""
    return [item for part in zip(*gather(list(map(list, parts))), strict=True) for own in part for item in own]


def own_path(path: Path) -> Path:
    """Where this process keeps what each has one of: "journal.jsonl" of process 0, "journal.1.jsonl" and so on."""
    number = jax.process_index()
    return path.with_suffix(f".{number}{path.suffix}") if number else path


def most(values: Sequence[int]) -> list[int]:
    """The largest of everybody's numbers, place by place."""
    return [max(place) for place in zip(*gather(list(values)), strict=True)]


def from_main(compute: Callable[[], T]) -> T:
    """What process 0 computes (plain JSON); the others wait for it, and so for all that it did before.

    Nothing in `compute` reaches the others but this: where it is told to stop, they stop as well.

    Raises:
      UserError: in all of them, what `compute` ended with.
    """
    if jax.process_count() == 1 or _apart:
        return compute()
    told: Any = (False, None)
    refused: UserError | None = None
    if is_main():
        _apart.append(True)
        try:
            told = (False, compute())
        except preemption.Preempted as stop:
            told = (True, stop.reason)
        except UserError as error:
            refused, told = error, (False, {_REFUSED: str(error)})
        finally:
            _apart.clear()
    stopped, value = gather(told)[0]
    if isinstance(value, dict) and _REFUSED in value:
        shared = refused or UserError(value[_REFUSED])
        shared.agreed = True
        raise shared
    if stopped and value:
        preemption.give_up(value)
    if stopped:
        preemption.stop()
    return value


def _wait_for(key: str) -> str:
    """A key of the store, once it is there. In pieces, so that Python hears signals."""
    while True:
        try:
            return _store().blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LostError("process 0, which passes messages on, is gone") from error


def _tell_stop(signal: str) -> None:
    """Tells all processes of a signal; in a thread, and whoever has gone need not know."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().key_value_set(_STOP, signal)


def _told_stop() -> str:
    try:
        return _store().key_value_try_get(_STOP)
    except jax.errors.JaxRuntimeError:  # nobody has told anything; or the coordinator is gone, which others notice
        return ""


def _store() -> Any:
    return distributed.global_state.client


def check_same(settings: Mapping[str, str]) -> None:
    """Raises ConfigError where this process was started with other settings than process 0."""
    first = gather(dict(settings))[0]
    for name in sorted(first.keys() | settings.keys()):
        theirs, mine = (found.get(name, "(not set)") for found in (first, settings))
        if theirs != mine:
            raise ConfigError(
                f"process {jax.process_index()} was started with config.{name}={mine}, process 0 with {theirs}; "
                "start all processes with the same command"
            )


def check_shared(directory: Path) -> None:
    """Checks that all processes see the same directory.

    Raises:
      ConfigError: this one does not see what process 0 has written.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        mark = directory / f".seen-{os.urandom(4).hex()}"
        mark.touch()
        return mark.name

    mark = directory / from_main(write)
    seen = mark.exists()
    gather(None)  # all have looked
    if is_main():
        mark.unlink()
    if not seen:
        raise ConfigError(
            f"process {jax.process_index()} does not see what process 0 writes to {directory}: put it on storage that "
            "all hosts mount (NFS, Filestore, Lustre, a bucket through gcsfuse)"
        )


def several() -> bool:
    """Whether this process has joined others; asks for no devices."""
    return jax.distributed.is_initialized()


def is_loss(error: Exception) -> bool:
    """Whether this is how messages or device programs say that another process is gone."""
    if isinstance(error, LostError):
        return True
    return isinstance(error, RuntimeError | ValueError) and bool(_LOSS.search(str(error)))


def leave(code: int) -> NoReturn:
    """Ends this process at once, after a failure that the others know nothing of.

    An ordinary exit would wait minutes for processes that wait for this one; so they lose it, and end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
