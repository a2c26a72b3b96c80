"""Partial rotary position embedding."""

import jax.numpy as jnp


def rotary_angles(positions_BT, rotary_dim, theta):
  """cos and sin [B, T, rotary_dim/2] in float32; frequency j is theta^(-2j/rotary_dim)."""
  frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
  angle = positions_BT[..., None].astype(jnp.float32) * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHDh, cos_BTR, sin_BTR):
  """Rotates the first 2R of Dh dimensions, pairing i with i + R (rotate-half); the rest passes through."""
  half = cos_BTR.shape[-1]
  cos, sin = (a[:, :, None, :].astype(x_BTHDh.dtype) for a in (cos_BTR, sin_BTR))
  first, second, rest = jnp.split(x_BTHDh, (half, 2 * half), axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
