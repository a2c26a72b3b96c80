"""The decoder: embed, scan over repeats of the layer pattern, norm; MTP modules; the head is left to the loss.

`Decoder.apply` returns hidden states rather than logits, so that the loss can chunk the head (mmx/loss.py). Variables
are two plain dicts: 'params', which the optimizer sees, and 'router' (expert biases), which it never does. A third
tree, the cache of generation, is an argument and a result (`init_cache`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mmx.config import Layer, ModelConfig, parse_pattern
from mmx.layers import context_parallel
from mmx.layers.block import remat_block
from mmx.layers.context import Context
from mmx.layers.embedding import Embedding
from mmx.layers.mixer import MIXERS
from mmx.layers.mtp import MTPModule
from mmx.layers.norm import Norm


@struct.dataclass
class Output:
  """hidden [B, T, D] for token t + 1; mtp[i] [B, T, D] for token t + 2 + i.

  aux: {'segment_s': {'layer_i': {'mixer': IndexAux, 'ffn': MoEAux}}, 'mtp_i': {'block': ...}}, where a layer has them.
  cache: None, or what `init_cache` made, with these tokens in it; then there are no mtp.
  """

  hidden: jax.Array
  mtp: tuple[jax.Array, ...]
  aux: dict[str, Any]
  head: jax.Array  # [D, V] float32
  cache: Any = None


class Unit(nn.Module):
  """One repeat of a segment: its layers in order, the first of them layer `first_layer` (int32) of the model.

  Returns (x [B, T, D], ({'layer_i': aux}, {'layer_i': cache})).
  """

  layers: tuple[Layer, ...]
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, first_layer, cache):
    auxes, caches = {}, {}
    for i, layer in enumerate(self.layers):
      name = f'layer_{i}'
      block = remat_block(self.model)(layer, self.model, self.mesh, name=name)
      x_BTD, caches[name], auxes[name] = block(x_BTD, context, first_layer + i, cache[name] if cache else None)
    return x_BTD, ({name: aux for name, aux in auxes.items() if aux}, caches)


class Decoder(nn.Module):
  """A decoder-only language model of any layer pattern."""

  model: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, segment_ids_BT, cache=None, warmup=None) -> Output:
    """tokens, positions, segment_ids: int32 [B, T]; cache and warmup: see `init_cache` and layers/context.py.

    Raises:
      ConfigError: T does not divide by the mesh's axis 'context', or there is a cache and that axis is not 1.
    """
    m = self.model
    context_parallel.check(self.mesh, tokens_BT.shape[1], bool(cache))
    dtype = jnp.dtype(m.compute_dtype)
    context = Context(positions_BT, segment_ids_BT, warmup)
    embedding = Embedding(m.vocab_size, m.d_model, m.tie_embeddings, self.mesh, name='embedding')
    x_BTD = ahead_BTD = embedding(tokens_BT, dtype)
    auxes, caches = {}, {}

    segments, first_layer = parse_pattern(m.pattern), 0
    for s, segment in enumerate(segments):
      name, depth = f'segment_{s}', len(segment.unit)
      scanned = nn.scan(
          Unit,
          length=segment.repeats,
          variable_axes={'params': 0, 'router': 0},
          split_rngs={'params': True},
          in_axes=(nn.broadcast, 0, 0),
          metadata_params={nn.PARTITION_NAME: 'layers'},
          unroll=segment.repeats if m.layer_loop == 'unroll' else 1,
      )(segment.unit, m, self.mesh, name=name)
      first_layers = first_layer + depth * jnp.arange(segment.repeats, dtype=jnp.int32)
      x_BTD, (aux, caches[name]) = scanned(x_BTD, context, first_layers, cache[name] if cache else None)
      first_layer += depth * segment.repeats
      if aux:
        auxes[name] = aux
    hidden_BTD = Norm(m.norm, m.norm_eps, name='final_norm')(x_BTD)
    if cache:
      return Output(hidden_BTD, (), auxes, embedding.head_weight(), caches)

    predicted = []
    for i in range(m.mtp.depth):
      module = MTPModule(segments[-1].unit[-1], m, self.mesh, name=f'mtp_{i}')
      # Moved, not looked up again: the gradient of M2's table is 2.3 GiB in float32, once instead of once a module.
      ahead_BTD = context_parallel.one_after(ahead_BTD, self.mesh)
      x_BTD, normed_BTD, aux = module(x_BTD, ahead_BTD, context)
      predicted.append(normed_BTD)
      if aux:
        auxes[f'mtp_{i}'] = {'block': aux}
    return Output(hidden_BTD, tuple(predicted), auxes, embedding.head_weight())


def init_variables(model: ModelConfig, mesh: Mesh | None, rng):
  """Variables with logical axes still attached ({'params': ..., 'router': ...}); trace it, or jit it with shardings."""
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  # What is made does not depend on the kernels that will use it, and those that are named may not serve this host.
  any_form = lambda part: dataclasses.replace(part, implementation='auto')
  parts = {name: any_form(getattr(model, name)) for name in ('attention', 'sliding', 'lightning', 'msa', 'moe')}
  model = dataclasses.replace(model, **parts)
  return Decoder(model, None).init(rng, tokens_BT, tokens_BT, tokens_BT)


def init_cache(model: ModelConfig, batch_size: int, max_length: int):
  """An empty cache for documents of up to `max_length` tokens: {'segment_s': {'layer_i': the mixer's, stacked}}.

  Give it to `Decoder.apply` with the tokens that come next and take the one that it returns. MTP modules have none.
  """
  dtype = jnp.dtype(model.compute_dtype)
  stack = lambda repeats, tree: jax.tree.map(lambda leaf: jnp.repeat(leaf[None], repeats, axis=0), tree)
  return {
      f'segment_{s}': stack(segment.repeats, {
          f'layer_{i}': MIXERS[layer.mixer].init_cache(model, batch_size, max_length, dtype)
          for i, layer in enumerate(segment.unit)
      })
      for s, segment in enumerate(parse_pattern(model.pattern))
  }
