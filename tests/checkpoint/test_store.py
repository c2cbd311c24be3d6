"""Checkpoints come back bit for bit, on any mesh, or say why not."""

import json
import pwd
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from maestro_jax.checkpoint.committed import write_manifest
from maestro_jax.checkpoint.store import CheckpointStore, Restored, named_leaves
from maestro_jax.errors import ConfigError, NonFiniteError
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.update import TrainState, init_train_state
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_shardings
from maestro_jax.policy.layers import Linear

RUN = {"data": {"position": 12, "skipped": ["a/3"]}, "seconds": 1.5}


class Toy(nnx.Module):
    """Two layers, so that names are nested; one in bfloat16."""

    def __init__(self, width: int):
        rngs = nnx.Rngs(0)
        self.first = Linear(8, width, ("embed", "mlp"), True, jnp.float32, rngs)
        self.second = Linear(width, 8, ("mlp", "embed"), False, jnp.bfloat16, rngs)


def make_state(axes: tuple[int, int, int], width: int = 12, fill: float | None = None) -> TrainState:
    """A train state with awkward values (`fill` None) or a constant everywhere."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    params = nnx.state(Toy(width), nnx.Param)
    params = jax.device_put(params, param_shardings(params, mesh, ShardingRules()))
    state = init_train_state(params, make_optimizer(OptimizerConfig(1e-3, 2, 0, 0.9, 0.95, 1e-8, 0.0, 1.0)), (), mesh)
    rng = np.random.default_rng(0)

    def value(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            new = np.full(leaf.shape, 7 if fill is None else fill)
        else:
            new = rng.standard_normal(leaf.shape) * 10.0 ** rng.integers(-30, 30, leaf.shape)
            new = new if fill is None else np.full(leaf.shape, fill)
        return jax.device_put(jnp.asarray(new, leaf.dtype), leaf.sharding)

    return jax.tree.map(value, state)


def save(directory: Path, state: Any, *steps: int, keep: int = 2) -> None:
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, state, RUN)
    store.close()


def restore(directory: Path, state: Any) -> Restored | None:
    store = CheckpointStore(directory, 2)
    try:
        return store.restore_newest(state)
    finally:
        store.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 1), (1, 1, 1)], ids=str)
def test_a_new_process_gets_every_bit_back_on_any_mesh(axes: tuple[int, int, int], tmp_path: Path) -> None:
    saved, target = make_state((2, 2, 2)), make_state(axes, fill=0.0)
    save(tmp_path, saved, 3)
    restored = restore(tmp_path, target)
    assert restored is not None and (restored.step, restored.run) == (3, RUN)
    found = restored.state
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(target))  # two states need not fit
    assert jax.tree.structure(found) == jax.tree.structure(target)
    wanted = named_leaves(saved)
    for (name, leaf), place in zip(named_leaves(found).items(), jax.tree.leaves(target), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(wanted[name]).tobytes(), name
        assert leaf.dtype == wanted[name].dtype and leaf.sharding == place.sharding, name


@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(where: str, tmp_path: Path) -> None:
    good = make_state((1, 2, 1))
    save(tmp_path, good, 3)
    spoiled = {name: leaf for name, leaf in named_leaves(getattr(good, where)).items() if leaf.ndim == 2}
    leaves, structure = jax.tree.flatten(good)
    bad = [leaf.at[0, 0].set(jnp.nan) if leaf is next(iter(spoiled.values())) else leaf for leaf in leaves]
    with pytest.raises(NonFiniteError, match=rf"^the state of step 4 .* in 1 of \d+ arrays \(first {where}/") as told:
        save(tmp_path, jax.tree.unflatten(structure, bad), 4)
    assert "\n" not in str(told.value) and "new --workdir" in str(told.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["3"]


def test_files_of_a_user_who_has_no_name_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a share that other machines write to, and in a container with a number for a user."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    state = make_state((1, 1, 1))
    save(tmp_path, state, 3)
    restored = restore(tmp_path, state)
    assert restored is not None and restored.step == 3


def test_latest_and_how_many_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    assert store.latest() is None
    store.close()
    save(tmp_path, {"w": jnp.ones(3)}, 1, 2, 3)
    again = CheckpointStore(tmp_path, 2)
    assert again.latest() == 3
    assert names(tmp_path) == ["2", "3"]
    again.close()


def test_another_width_is_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, make_state((1, 1, 1)), 3)
    with pytest.raises(ConfigError, match=r"checkpoint .*/3 holds float32\[12\] as .*first/bias") as caught:
        restore(tmp_path, make_state((1, 1, 1), width=16))
    text = str(caught.value)
    assert "this configuration makes float32[16]; use the configuration it was trained with" in text
    assert "\n" not in text
    assert names(tmp_path) == ["3"]  # a wrong configuration is no damage


@pytest.mark.parametrize("missing", ["saved", "wanted"])
def test_a_missing_parameter_is_named(missing: str, tmp_path: Path) -> None:
    whole, part = {"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": jnp.ones(3)}
    save(tmp_path, part if missing == "saved" else whole, 1)
    message = (
        r"holds nothing as b, this configuration makes float32\[2\]"
        if missing == "saved"
        else r"holds float32\[2\] as b, this configuration makes nothing"
    )
    with pytest.raises(ConfigError, match=message):
        restore(tmp_path, whole if missing == "saved" else part)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    """Orbax would cast."""
    save(tmp_path, {"w": jnp.ones(3, jnp.bfloat16)}, 1)
    with pytest.raises(ConfigError, match=r"holds bfloat16\[3\] as w, this configuration makes float32\[3\]"):
        restore(tmp_path, {"w": jnp.ones(3)})


def test_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": jnp.ones(3)}, 1)
    path = epath.Path(tmp_path / "1")
    found = json.loads((path / "run/run.json").read_text())
    (path / "run/run.json").write_text(json.dumps(found | {"format": 7}))
    write_manifest(path)
    with pytest.raises(ConfigError, match="has format 7, this version reads format 2; go on with the version"):
        restore(tmp_path, {"w": jnp.ones(3)})
    # What the first version wrote: another file for JSON, no manifest.
    (path / "MANIFEST").unlink()
    (path / "run/run.json").rename(path / "run/metadata")
    with pytest.raises(ConfigError, match="has format 1"):
        restore(tmp_path, {"w": jnp.ones(3)})
    assert names(tmp_path) == ["1"]


@pytest.mark.parametrize(("keep", "keep_every", "left"), [(2, 0, "5 6"), (0, 0, "1 2 3 4 5 6"), (1, 2, "2 4 6")])
def test_which_checkpoints_are_kept(keep: int, keep_every: int, left: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep, keep_every)
    for step in range(1, 7):
        store.save(step, {"w": jnp.ones(3)}, {})
    store.close()
    assert names(tmp_path) == left.split()


def test_nothing_saved_is_nothing_restored(tmp_path: Path) -> None:
    assert restore(tmp_path / "new", {"w": jnp.ones(3)}) is None


def test_what_a_kill_left_unfinished_is_removed(tmp_path: Path) -> None:
    save(tmp_path, {"w": jnp.ones(3)}, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    save(tmp_path, {"w": jnp.zeros(3)}, 2)
    assert names(tmp_path) == ["1", "2"]
    restored = restore(tmp_path, {"w": jnp.ones(3)})
    assert restored is not None and restored.step == 2 and not restored.state["w"].any()


def test_leaves_are_named_by_their_path() -> None:
    names = named_leaves(make_state((1, 1, 1)))
    assert "step" in names and any(name.startswith("params/first/kernel") for name in names)
