"""One mixer layer by itself, as the tests of every mixer use it: built, packed, and served chunk by chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmx.layers.context import Context
from mmx.model import init_variables


def packed(*lengths, padding=0):
  """The context of one row that holds documents of these lengths, padding last."""
  positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
  segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
  return Context(jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32))


def randomised(tree, seed):
  """Unboxed parameters, norms, gates and biases too: their defaults of 1 and 0 would hide a missing use."""
  rng = np.random.default_rng(seed)  # of numpy: jax's would take longer to compile than the parameters themselves
  return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(a.dtype), nn.unbox(tree))


@functools.cache
def variables(model, seed=0):
  """Randomised variables of a whole decoder."""
  return jax.jit(lambda rng: randomised(init_variables(model, None, rng), seed + 1))(jax.random.key(seed))


def build(layer, config, length, rows=1, seed=0):
  """The layer, its randomised parameters, x [rows, length, D], and the context of rows of one document."""
  mixer = layer(config, 1.0, None)
  x_BTD = jax.random.normal(jax.random.key(seed), (rows, length, config.d_model))
  context = jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), packed(length))
  tree = jax.jit(mixer.init)(jax.random.key(1), x_BTD, context, 0, None)
  return mixer, randomised(tree, seed=2), x_BTD, context


def close(found, wanted, tolerance=2e-5):
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * float(jnp.abs(wanted).max()))


def serve(mixer, tree, cache, x_BTD, chunks):
  """All tokens through the cache in chunks [(T, tokens of each row in it)]; the rest of a row is padding, and loud.

  Returns:
    y [B, T, D], the last cache, and what came out for padding [n, D].
  """
  apply = jax.jit(lambda x, context, cache: mixer.apply(tree, x, context, jnp.int32(1), cache)[:2])
  B, length, D = x_BTD.shape
  done_B, y_BTD, padding = np.zeros(B, int), np.full(x_BTD.shape, np.nan), [np.zeros((0, D))]
  for T, new_B in chunks:
    slot_BT = done_B[:, None] + np.arange(T)
    real_BT = np.arange(T) < np.array(new_B)[:, None]
    x_chunk = jnp.where(real_BT[..., None], x_BTD[np.arange(B)[:, None], np.minimum(slot_BT, length - 1)], 99.0)
    context = Context(jnp.asarray(slot_BT * real_BT, jnp.int32), jnp.asarray(real_BT, jnp.int32))
    y_chunk, cache = apply(x_chunk, context, cache)
    rows, columns = np.nonzero(real_BT)
    y_BTD[rows, slot_BT[rows, columns]] = np.asarray(y_chunk)[rows, columns]
    padding.append(np.asarray(y_chunk)[~real_BT])
    done_B += np.array(new_B)
  assert list(done_B) == [length] * B
  return jnp.asarray(y_BTD), cache, np.concatenate(padding)
