"""Floating-point operations of a forward pass in the group's shape, from the architecture.

Counted are matrix products, two operations for each multiply and add, and of attention the pairs of query and key that
the group's mask lets see each other (a kernel that computes masked pairs, too, does up to twice as many). A backward
pass costs two forward passes, and one more where layers are recomputed (`config.policy.remat`).
"""

import dataclasses

from maestro_jax.policy.config import PolicyArchitecture


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one forward pass by where they are spent."""

    vision: int
    projections: int  # of the decoder: queries, keys, values, output and MLP
    attention: int  # of the decoder
    head: int

    @property
    def total(self) -> int:
        return self.vision + self.projections + self.attention + self.head


def group_flops(
    architecture: PolicyArchitecture, root: int, prefix: int, members: int, room: int, images: int, patches: int
) -> Flops:
    """One group on top of a root whose keys and values are at hand.

    Args:
      root, prefix, room: tokens of the root (P0), of the prefix (P) and of each member (R), padding included.
      members: G.
      images: image slots of the group.
      patches: of each slot.
    """
    text, own = architecture.text, members * room
    seen = _causal(root, prefix) + members * _causal(root + prefix, room)
    return Flops(
        vision=images * _image_flops(architecture, patches),
        projections=(prefix + own) * _token_flops(architecture),
        attention=seen * _pair_flops(architecture),
        head=own * 2 * text.hidden_size * text.vocab_size,
    )


def root_flops(architecture: PolicyArchitecture, root: int) -> Flops:
    """The root, which every device computes once for all groups it has in a pass."""
    return Flops(0, root * _token_flops(architecture), _causal(0, root) * _pair_flops(architecture), 0)


def _causal(before: int, own: int) -> int:
    """Pairs of `own` queries, each of which sees all tokens `before`, its predecessors and itself."""
    return own * before + own * (own + 1) // 2


def _token_flops(architecture: PolicyArchitecture) -> int:
    text = architecture.text
    q_width, kv_width = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * q_width + 2 * kv_width + 3 * text.intermediate_size)
    return text.num_hidden_layers * 2 * weights


def _pair_flops(architecture: PolicyArchitecture) -> int:
    """A score and a weighted value, in every head and layer."""
    text = architecture.text
    return text.num_hidden_layers * 4 * text.num_attention_heads * text.head_dim


def _image_flops(architecture: PolicyArchitecture, patches: int) -> int:
    vision = architecture.vision
    width, merge = vision.hidden_size, vision.spatial_merge_size**2
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 2 * width * (4 * width + 2 * vision.intermediate_size) + 4 * patches * width
    joined = width * merge
    merger = 2 * joined * (joined + vision.out_hidden_size)
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return patches * (2 * channels * width + vision.depth * block) + patches // merge * mergers * merger
