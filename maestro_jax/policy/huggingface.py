"""The table between our parameters and a Hugging Face Qwen3-VL checkpoint, and the way in.

Only names and layouts differ: our layers are stacked `[L, ...]`, our kernels are `[in, out]`, and the
patch embedding is a matrix instead of a convolution whose stride is its size. Reading goes through
`safetensors` slices, so a process touches only the bytes of the shards it holds.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from maestro_jax.errors import ConfigError

Index = tuple[slice, ...]

_KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_LAYER = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    **{name: name for name in ("input_layernorm", "post_attention_layernorm")},
}
_BLOCK = {
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
    "norm1": "norm1",
    "norm2": "norm2",
}
_MERGER = {"fc1": "linear_fc1", "fc2": "linear_fc2", "norm": "norm"}
_SINGLE = {
    "lm_head": "lm_head",
    "language_model/embed_tokens": "model.language_model.embed_tokens",
    "language_model/norm": "model.language_model.norm",
    "visual/pos_embed": "model.visual.pos_embed",
    "visual/patch_embed": "model.visual.patch_embed.proj",
}
# A tied head is the embedding; some files repeat it. An untied one is in the table and is read.
_IGNORED = frozenset({"lm_head.weight"})
_DEEPSTACK_LAYERS = "language_model/deepstack_layers/"
_SHOWN = 8  # names listed of each kind of mistake


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """Where a parameter stands in a Hugging Face checkpoint.

    Attributes:
      names: one tensor, or one for each layer of a stack.
      shape: of each of these tensors.
      stacked: whether our array has a leading layer axis.
      layout: "same", "transposed", or "patches" (`[out, channels, time, height, width]`).
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    layout: str

    def to_hf(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Our array as their tensors (views where possible)."""
        parts = list(array) if self.stacked else [array]
        turned = [part if self.layout == "same" else part.T for part in parts]
        return {name: part.reshape(self.shape) for name, part in zip(self.names, turned, strict=True)}

    def from_hf(self, read: Callable[[str, Index], np.ndarray], index: Index) -> np.ndarray:
        """The part `index` of our array; `read(name, index)` gives part of one of their tensors."""
        layers, inner = (range(len(self.names))[index[0]], index[1:]) if self.stacked else ((0,), index)
        parts = [self._one(read, self.names[layer], inner) for layer in layers]
        return np.stack(parts) if self.stacked else parts[0]

    def _one(self, read: Callable[[str, Index], np.ndarray], name: str, inner: Index) -> np.ndarray:
        if self.layout == "same":
            return read(name, inner)
        if self.layout == "transposed":
            return read(name, inner[::-1]).T
        whole = read(name, tuple(slice(None) for _ in self.shape))
        return whole.reshape(self.shape[0], -1).T[inner]


def counterparts(shapes: Mapping[str, Sequence[int]], patch: tuple[int, int, int, int]) -> dict[str, Counterpart]:
    """The whole table: the Hugging Face side of every parameter.

    Args:
      shapes: by name as `param_names` gives it, "language_model/layers/q_proj/kernel".
      patch: (channels, time, height, width) of a patch.
    """
    before = {
        name.removeprefix(_DEEPSTACK_LAYERS).split("/")[0] for name in shapes if name.startswith(_DEEPSTACK_LAYERS)
    }
    return {name: _counterpart(name, shape, patch, len(before)) for name, shape in shapes.items()}


def _counterpart(name: str, shape: Sequence[int], patch: tuple[int, int, int, int], before: int) -> Counterpart:
    """One row; `before` decoder layers stand apart from the stacked ones."""
    module, kind = name.rsplit("/", 1)
    template, stacked = _module_name(module)
    first = before if module.startswith("language_model/layers/") else 0
    names = tuple(template.format(first + i) for i in range(shape[0] if stacked else 1))
    own = tuple(shape[1:] if stacked else shape)
    layout = "same"
    if kind == "kernel":
        layout = "patches" if module == "visual/patch_embed" else "transposed"
        own = (own[1], *patch) if layout == "patches" else own[::-1]
    return Counterpart(tuple(f"{name}.{_KINDS[kind]}" for name in names), own, stacked, layout)


def _module_name(module: str) -> tuple[str, bool]:
    if module in _SINGLE:
        return _SINGLE[module], False
    parent, part = module.rsplit("/", 1)
    if parent == "language_model/layers":
        return f"model.language_model.layers.{{}}.{_LAYER[part]}", True
    if parent == "visual/blocks":
        return f"model.visual.blocks.{{}}.{_BLOCK[part]}", True
    if parent == "visual/merger":
        return f"model.visual.merger.{_MERGER[part]}", False
    if parent.startswith(_DEEPSTACK_LAYERS):
        return f"model.language_model.layers.{parent.removeprefix(_DEEPSTACK_LAYERS)}.{_LAYER[part]}", False
    tap = parent.removeprefix("visual/deepstack_mergers/")
    return f"model.visual.deepstack_merger_list.{tap}.{_MERGER[part]}", False


class TensorFiles:
    """The tensors of a checkpoint directory: `model.safetensors`, or shards with their index."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[Path, Any] = {}
        self._places = self._find()

    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: Index) -> np.ndarray:
        """Part of a tensor in its own dtype; only these bytes are read."""
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        return self._open(self._places[name]).get_slice(name)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, "numpy")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} cannot be read ({error}); download or copy it again") from None
        return self._files[path]

    def _find(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                weights = json.loads(index.read_text("utf-8"))["weight_map"]
                return {name: self.directory / file for name, file in weights.items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigError(f"{index} is damaged ({error!r}); download or copy it again") from None
        single = self.directory / "model.safetensors"
        if not single.is_file():
            raise ConfigError(
                f"{self.directory} has neither model.safetensors nor model.safetensors.index.json; "
                "point config.policy.init_from at a Hugging Face checkpoint directory"
            )
        return dict.fromkeys(self._open(single).keys(), single)


def import_params(
    directory: str | Path, abstract: nnx.State, shardings: Any, patch: tuple[int, int, int, int]
) -> nnx.State:
    """Reads a checkpoint directory straight into sharded parameters.

    Args:
      abstract: the parameters' state, of shapes and dtypes only; values are cast to these dtypes.
      shardings: a tree like it; every process reads what its own devices hold.
      patch: (channels, time, height, width) of a patch.

    Raises:
      ConfigError: tensors are missing, left over, or of another shape; all of them in one error.
    """
    files = TensorFiles(directory)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    table = counterparts({name: leaf.shape for name, (_, leaf) in zip(names, leaves, strict=True)}, patch)
    _compare(files, table)

    def load(name: str, leaf: Any, sharding: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return np.ascontiguousarray(table[name].from_hf(files.read, tuple(index)), dtype=leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    places = jax.tree.leaves(shardings)
    arrays = [load(name, leaf, place) for name, (_, leaf), place in zip(names, leaves, places, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def _compare(files: TensorFiles, table: Mapping[str, Counterpart]) -> None:
    wanted = {name: part.shape for part in table.values() for name in part.names}
    found = files.names()
    wrong = [
        f"{name} is {files.shape(name)}, config.json makes {wanted[name]}"
        for name in sorted(wanted.keys() & found)
        if files.shape(name) != wanted[name]
    ]
    problems = {
        "missing": sorted(wanted.keys() - found),
        "unknown": sorted(found - wanted.keys() - _IGNORED),
        "of another shape": wrong,
    }
    said = [f"{len(names)} tensors {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if said:
        raise ConfigError(
            f"{files.directory} does not fit the policy's architecture; {'; '.join(said)}. "
            "Use the config.json that belongs to these weights"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
