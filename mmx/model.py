"""The decoder: embed, scan over repeats of the layer pattern, norm; MTP modules; the head is left to the loss.

`Decoder.apply` returns hidden states rather than logits, so that the loss can chunk the head (mmx/loss.py). Variables
are two plain dicts: 'params', which the optimizer sees, and 'router' (expert biases), which it never does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mmx.config import Layer, ModelConfig, parse_pattern
from mmx.layers.block import remat_block
from mmx.layers.embedding import Embedding
from mmx.layers.mtp import MTPModule, shift_left
from mmx.layers.norm import RMSNorm


@struct.dataclass
class Output:
  """hidden [B, T, D] for token t + 1; mtp[i] [B, T, D] for token t + 2 + i; aux mirrors the 'router' collection."""

  hidden: jax.Array
  mtp: tuple[jax.Array, ...]
  aux: dict[str, Any]
  head: jax.Array  # [D, V] float32


class Unit(nn.Module):
  """One repeat of a segment: its layers in order. aux maps 'layer_i' to the MoEAux of each MoE layer."""

  layers: tuple[Layer, ...]
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segment_ids_BT):
    auxes = {}
    for i, layer in enumerate(self.layers):
      block = remat_block(self.model)(layer, self.model, self.mesh, name=f'layer_{i}')
      x_BTD, aux = block(x_BTD, positions_BT, segment_ids_BT)
      if aux is not None:
        auxes[f'layer_{i}'] = aux
    return x_BTD, auxes


class Decoder(nn.Module):
  """A decoder-only language model of any layer pattern."""

  model: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, segment_ids_BT) -> Output:
    m = self.model
    dtype = jnp.dtype(m.compute_dtype)
    embedding = Embedding(m.vocab_size, m.d_model, m.tie_embeddings, name='embedding')
    x_BTD = embedding(tokens_BT, dtype)
    auxes = {}

    segments = parse_pattern(m.pattern)
    for s, segment in enumerate(segments):
      scanned = nn.scan(
          Unit,
          length=segment.repeats,
          variable_axes={'params': 0, 'router': 0},
          split_rngs={'params': True},
          in_axes=nn.broadcast,
          metadata_params={nn.PARTITION_NAME: 'layers'},
          unroll=segment.repeats if m.layer_loop == 'unroll' else 1,
      )(segment.unit, m, self.mesh, name=f'segment_{s}')
      x_BTD, aux = scanned(x_BTD, positions_BT, segment_ids_BT)
      if aux:
        auxes[f'segment_{s}'] = aux
    hidden_BTD = RMSNorm(m.norm_eps, name='final_norm')(x_BTD)

    predicted = []
    for i in range(m.mtp.depth):
      module = MTPModule(segments[-1].unit[-1], m, self.mesh, name=f'mtp_{i}')
      ahead_BTD = embedding(shift_left(tokens_BT, i + 1), dtype)
      x_BTD, normed_BTD, aux = module(x_BTD, ahead_BTD, positions_BT, segment_ids_BT)
      predicted.append(normed_BTD)
      if aux is not None:
        auxes[f'mtp_{i}'] = {'block': aux}
    return Output(hidden_BTD, tuple(predicted), auxes, embedding.head_weight())


def init_variables(model: ModelConfig, mesh: Mesh | None, rng):
  """Variables with logical axes still attached ({'params': ..., 'router': ...}); trace it, or jit it with shardings."""
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  return Decoder(model, None).init(rng, tokens_BT, tokens_BT, tokens_BT)
