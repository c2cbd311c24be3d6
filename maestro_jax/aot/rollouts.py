"""The programs of a rollout (`rollout/programs.py`), compiled as a run would."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maestro_jax.aot.program import Decoded, Program, bytes_on_device
from maestro_jax.aot.run import Run, placed
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.parallel.sharding import gathered_spec, heads_spec
from maestro_jax.policy.attention.cascade import LaneKV
from maestro_jax.policy.flops import Flops, group_flops, root_flops
from maestro_jax.policy.model import DecodingPolicy
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import StopTables
from maestro_jax.rollout.engine import EngineConfig, rollout_sizes
from maestro_jax.rollout.programs import Weights, rollout_programs
from maestro_jax.rollout.state import Groups, Lanes
from maestro_jax.session.policy import fields

T = TypeVar("T")


class Rollouts:
    """What the devices hold while episodes run, and the programs that change it.

    Raises:
      ConfigError: lanes or groups do not divide over the mesh.
    """

    def __init__(self, run: Run):
        self.run = run
        self.config = fields(EngineConfig, run.config.rollout)
        self.shards = batch_shards(run.mesh)
        s = run.sizes
        self.sizes = rollout_sizes(self.config, self.shards, s.groups, s.members, s.prefix)
        self.functions = rollout_programs(run.graph, self.sizes, self.config.decoding)
        self.root = run.array((s.root,), jnp.int32, run.everywhere)

    # ---- What is held --------------------------------------------------------------------------

    @functools.cached_property
    def weights(self) -> Weights:
        """What decoding takes of the parameters."""
        run = self.run
        with jax.set_mesh(run.mesh):
            shapes = jax.eval_shape(self.functions.weights, run.params).whole()
        if isinstance(shapes, nnx.State):
            return Weights.of(run.params)  # themselves

        def one(param: nnx.Variable) -> nnx.Variable:
            return param.replace(self._placed(param.get_value(), gathered_spec(param.get_metadata("axes"))))

        layers, norm = jax.tree.map(one, (shapes.layers, shapes.norm), is_leaf=lambda x: isinstance(x, nnx.Variable))
        tables = (shapes.embedding, shapes.head)
        embedding, head = jax.tree.map(lambda x: self._placed(x, gathered_spec(("vocab", "embed"))), tables)
        return Weights.of(DecodingPolicy(embedding, layers, norm, head, shapes.precision))

    @property
    def weights_are_parameters(self) -> bool:
        return isinstance(self.weights.whole(), nnx.State)

    @functools.cached_property
    def episodes(self) -> tuple[Groups, Lanes, LaneKV]:
        """Groups, lanes and pages, as `rollout/state.py` spreads them."""
        run = self.run
        with jax.set_mesh(run.mesh):
            groups, lanes, pages = jax.eval_shape(self.functions.open, run.params, self.root)
        shared = dataclasses.replace(
            run.spread(groups.shared, run.groups),
            root_keys=self._by_heads(groups.shared.root_keys, 0),
            root_values=self._by_heads(groups.shared.root_values, 0),
            keys=self._by_heads(groups.shared.keys, 2),
            values=self._by_heads(groups.shared.values, 2),
        )
        groups = Groups(shared, run.spread(groups.hidden, run.groups))
        lanes = dataclasses.replace(run.spread(lanes, run.groups), cache=self._by_heads(lanes.cache, 2))
        return groups, lanes, self._by_heads(pages, 2)

    def _by_heads(self, kv: T, axis: int) -> T:
        return jax.tree.map(lambda x: self._placed(x, heads_spec(self.run.mesh, x.shape, axis)), kv)

    def _placed(self, x: Any, spec: PartitionSpec) -> Any:
        return placed(x, NamedSharding(self.run.mesh, spec))

    # ---- The programs --------------------------------------------------------------------------

    def programs(self) -> list[Program]:
        """Weights, root, prefill, a chunk of decoding (its operations are those of one token), observations, pages."""
        run, does, sizes = self.run, self.functions, self.sizes
        groups, lanes, pages = self.episodes
        always = [run.params, run.state.opt_state, run.reference, run.gradients if run.streams else None]
        root = root_flops(run.architecture, run.sizes.root).total / run.mesh.shape["tensor"]
        found = []
        if not self.weights_are_parameters:
            found.append(run.compile("weights", jax.jit(does.weights), (run.params,), always))
        held = [*always, self.weights]
        found.append(run.compile("open", does.open, (run.params, self.root), held, root))
        held += self.episodes

        number = sizes.prefill_groups * sizes.shards
        prompts = (run.prompts(number), self._rows(sizes.prefill_groups))
        flops = run.group_flops(number, members=0)
        found.append(run.compile("prefill", does.prefill, (run.params, groups, *prompts), held, flops))

        noise = run.array((), jnp.float32, run.everywhere)
        chunk = (self.weights, groups, lanes, self._tables(), noise)
        token = self._member_flops(1)
        decoded = Decoded(self.config.decode_chunk, self._least_bytes())
        found.append(run.compile("decode", does.decode, chunk, held, sizes.lanes * token.total, decoded))

        rows, width = sizes.append_rows, run.sizes.observation
        said = (self._rows(rows), self._rows(rows, width), self._rows(rows))
        own = self._member_flops(width)
        flops = rows * (own.projections + own.attention)
        found.append(run.compile("append", does.append, (self.weights, groups, lanes, *said), held, flops))
        if sizes.pages:
            where = (self._rows(rows), self._rows(rows, sizes.pages_of_lane))
            found.append(run.compile("park", does.park, (lanes, pages, *where), held))
            found.append(run.compile("load", does.load, (lanes, pages, *where), held))
        return found

    def _rows(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Orders of the exchange, `[D, ...]`."""
        return self.run.array((self.sizes.shards, *shape), jnp.int32)

    def _tables(self) -> StopTables:
        run, states = self.run, len(build_automaton([b"a"])[1])
        shape = (states, run.architecture.text.vocab_size)
        return StopTables(*[run.array(each, jnp.int32, run.everywhere) for each in (shape, (states,), ())])

    def _member_flops(self, tokens: int) -> Flops:
        """Of a member's first `tokens` tokens on one device."""
        s, tensor = self.run.sizes, self.run.mesh.shape["tensor"]
        one, none = (group_flops(self.run.architecture, s.root, s.prefix, n, tokens, 0, 0) for n in (1, 0))
        parts = [
            (getattr(one, field.name) - getattr(none, field.name)) // tensor for field in dataclasses.fields(Flops)
        ]
        return Flops(*parts)

    def _least_bytes(self) -> int:
        """That decoding a token in every lane reads and writes: weights, keys and values once, logits twice."""
        groups, lanes, _ = self.episodes
        shared, text = groups.shared, self.run.architecture.text
        kv = [shared.root_keys, shared.root_values, shared.keys, shared.values, lanes.cache]
        logits = self.sizes.lanes * text.vocab_size // self.run.mesh.shape["tensor"] * 4
        fresh = bytes_on_device(lanes.cache) // self.sizes.room
        return self._weight_bytes() + bytes_on_device(kv) + 2 * logits + fresh

    def _weight_bytes(self) -> int:
        """Of what decoding reads whole: the decoder and its head; of an embedding that is no head, a few rows."""
        run, text = self.run, self.run.architecture.text
        found = bytes_on_device(self.weights)
        if self.weights_are_parameters:
            found -= bytes_on_device(run.params["visual"])
        if run.architecture.tie_word_embeddings:
            return found
        table = text.vocab_size * text.hidden_size * jnp.dtype(run.config.policy.compute_dtype).itemsize
        return found - table // run.mesh.shape["tensor"]
