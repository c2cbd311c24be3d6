"""A run's directory: where its checkpoints are, and which checkpoints are its own."""

from pathlib import Path

import pytest

from maestro_jax.checkpoint.run import find_run
from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import write_json
from maestro_jax.session.binding import check_same_settings, settings_hashes
from maestro_jax.settings import Settings

SETTINGS = {"seed": "0", "registry.experts.Tally.timeout": "5.0", "registry.experts.Tally.price": "1.0"}


def write_run(workdir: Path, directory: str) -> Path:
    workdir.mkdir()
    Settings.of({"checkpoint": {"directory": directory}}).write(workdir / "config.json")
    write_json(workdir / "architecture.json", {})
    return workdir


@pytest.mark.parametrize(
    ("directory", "where"), [("", "{workdir}/checkpoints"), ("gs://bucket/run", "gs://bucket/run")]
)
def test_checkpoints_are_where_the_run_put_them(directory: str, where: str, tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run", directory)
    for given, step in ((workdir, None), (workdir / "checkpoints", None), (workdir / "checkpoints/12", 12)):
        found = find_run(given)
        assert (found.checkpoints, found.step, found.workdir) == (where.format(workdir=workdir), step, workdir)


def test_a_checkpoint_of_another_run_is_refused() -> None:
    mine = settings_hashes(SETTINGS)
    check_same_settings(mine, settings_hashes(SETTINGS), "/c")
    for change, part in (({"seed": "1"}, "config"), ({"registry.experts.Tally.price": "2.0"}, "registry")):
        with pytest.raises(ConfigError, match=f"the checkpoint in /c belongs to a run with another {part}; .* or use"):
            check_same_settings(settings_hashes(SETTINGS | change), mine, "/c")


def test_how_experts_are_reached_and_where_checkpoints_are_may_change() -> None:
    changed = SETTINGS | {"registry.experts.Tally.timeout": "7.0", "checkpoint.directory": "'/elsewhere'"}
    check_same_settings(settings_hashes(changed), settings_hashes(SETTINGS), "/c")
