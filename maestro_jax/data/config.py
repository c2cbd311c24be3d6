"""Settings of the data, with their defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """One source of a mixture.

    Attributes:
      kind, files, split, image_root: as `kind`, `train_files`, `train_split` and `image_root` of `DataConfig`, without
        the suite.
      weight: its share, relative to the others' weights.
    """

    kind: str
    files: tuple[str, ...]
    split: str = "train"
    image_root: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tasks come from.

    Attributes:
      kind: "suite" builds the offline suite; "tfds" reads data sets that `maestro_jax.data.prepare` (or anyone) made,
        "verl" parquet files in the verl schema, "jsonl" one JSON object a line, "package.module:name" what a function
        of the user's gives (docs/data.md).
      suite_directory: where suites are kept; empty means inside the work directory.
      train_per_domain, test_per_domain: size of the suite.
      train_files, test_files: the files of kinds "verl" and "jsonl", the data sets' directories of kind "tfds"; what
        a function of the user's is told.
      train_split, test_split: the splits of kind "tfds", such as "train", "test" or "train[:100]".
      image_root: folder that image paths in the files are resolved under; empty allows inline images only.
      mixture: what training draws from, in shares; empty takes the training tasks of `kind`. Held out are those of
        `kind` in any case.
      damage_limit: damaged rows that may be skipped (each is reported).
    """

    kind: str = "suite"
    suite_directory: str = ""
    train_per_domain: int = 80
    test_per_domain: int = 50
    train_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    image_root: str = ""
    mixture: tuple[MixedConfig, ...] = ()
    damage_limit: int = 0
