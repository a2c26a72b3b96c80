"""Gated feed-forward activations by name (`model.activation`): act(gate, up), elementwise, of equal shapes."""

import jax
import jax.numpy as jnp

ALPHA, LIMIT = 1.702, 7.0  # of swiglu_oai, as M3 was released


def swiglu(gate, up):
  """silu(gate) * up (Text-01, M2)."""
  return jax.nn.silu(gate) * up


def swiglu_oai(gate, up):
  """(up + 1) * gate * sigmoid(ALPHA * gate), gate clamped from above at LIMIT and up on both sides (M3)."""
  gate = jnp.minimum(gate, LIMIT)
  return (jnp.clip(up, -LIMIT, LIMIT) + 1) * gate * jax.nn.sigmoid(ALPHA * gate)


ACTIVATIONS = {'swiglu': swiglu, 'swiglu_oai': swiglu_oai}
