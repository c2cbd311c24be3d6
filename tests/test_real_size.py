"""The real size, 4.4 billion parameters, through import, checkpoint and export. Needs 20 GiB of memory, 40 GiB of disk.

pytest -m slow tests/test_real_size.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from configs import quickstart
from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.observe.files import write_json
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import PolicyArchitecture, TextConfig, VisionConfig
from maestro_jax.policy.hf_export import ShardWriter, hf_config
from maestro_jax.policy.huggingface import TensorFiles, counterparts, import_params
from maestro_jax.policy.model import Policy
from maestro_jax.settings import Settings

ROOT = Path(__file__).parents[1]
TEXT = TextConfig(151_936, 2560, 9728, 36, 32, 8, 128, 1e-6, 5e6, (24, 20, 20))
VISION = VisionConfig(24, 1024, 4096, 16, 3, 16, 2, 2, 2560, 2304, (5, 11, 17))
ARCHITECTURE = PolicyArchitecture(TEXT, VISION, 151_655, 151_652, 151_653, True)
PEAK_BYTES = 7e9  # of the export's resident memory
# Runs the command and notes its peak as the kernel saw it. (The maximum that getrusage tells of a child counts from
# before its exec, when it was still a copy of this process.)
EXPORT = """
import atexit, pathlib, runpy, sys
peak = pathlib.Path(sys.argv.pop(1))
status = lambda: pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1]
atexit.register(lambda: peak.write_text(status()))
runpy.run_module("maestro_jax.export", run_name="__main__", alter_sys=True)
"""


def write_random_checkpoint(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A Hugging Face directory of this architecture with random bits, none of them an infinity or NaN."""
    directory.mkdir()
    writer, rng = ShardWriter(directory), np.random.default_rng(0)
    for part in counterparts(shapes, VISION.patch_shape).values():
        for name in part.names:
            bits = rng.integers(0, 2**16, part.shape, np.uint16) & np.uint16(0xBFFF)
            writer.add(name, bits.view(ml_dtypes.bfloat16))
    writer.close()
    (directory / "config.json").write_text(json.dumps(hf_config(ARCHITECTURE, "bfloat16", None)))


@pytest.mark.slow
def test_four_billion_parameters_come_in_and_go_out_bit_for_bit(tmp_path: Path) -> None:
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    make = lambda: Policy(ARCHITECTURE, nnx.Rngs(0), jnp.bfloat16)  # noqa: E731
    _, abstract, shardings = param_layout(make, mesh, ShardingRules())
    shapes = {name.removesuffix("/value"): leaf.shape for name, leaf in named_leaves(abstract).items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 4_437_815_808
    write_random_checkpoint(tmp_path / "hf", shapes)
    assert len(TensorFiles(tmp_path / "hf").names()) == 713

    params = import_params(tmp_path / "hf", abstract, shardings, VISION.patch_shape)
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=1)
    store.save(1, {"params": params}, {})
    store.close()
    del params
    raw = quickstart.get_config()
    raw.policy.init_from, raw.policy.architecture = str(tmp_path / "hf"), {}
    Settings.of(raw).write(tmp_path / "run/config.json")
    write_json(tmp_path / "run/architecture.json", hf_config(ARCHITECTURE, "bfloat16", None))

    flags = [f"--checkpoint={tmp_path}/run", f"--output={tmp_path}/out", f"--base={tmp_path}/hf"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "peak"), *flags], cwd=ROOT, env=environment, check=True
    )
    peak = int((tmp_path / "peak").read_text().split()[0]) * 1024
    print(f"peak resident memory of the export: {peak / 1e9:.2f} GB")
    source, result = TensorFiles(tmp_path / "hf"), TensorFiles(tmp_path / "out")
    assert source.names() == result.names()
    for name in source.names():
        whole = tuple(slice(None) for _ in source.shape(name))
        assert source.read(name, whole).tobytes() == result.read(name, whole).tobytes(), name
    assert peak <= PEAK_BYTES
