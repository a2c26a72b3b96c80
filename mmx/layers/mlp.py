"""Dense gated feed-forward."""

import jax.numpy as jnp
from flax import linen as nn

from mmx.kernels_pallas.gated import ACTIVATIONS
from mmx.sharding import fan_in_normal, param


def gated(x_BTD, w_gate_up_D2F, w_down_FD, activation):
  """down(act(gate(x), up(x))); gate and up are one product."""
  gate_up = jnp.einsum('btd,dgf->btgf', x_BTD, w_gate_up_D2F.astype(x_BTD.dtype))
  return ACTIVATIONS[activation](gate_up[:, :, 0], gate_up[:, :, 1]) @ w_down_FD.astype(x_BTD.dtype)


class MLP(nn.Module):
  """Parameters of `gated` with hidden width d_ff; `out_scale` shrinks the residual branch at the start."""

  d_ff: int
  activation: str
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x_BTD):
    D = x_BTD.shape[-1]
    w_gate_up = param(self, 'w_gate_up', (D, 2, self.d_ff), ('embed', 'gate_up', 'hidden'), fan_in_normal(D))
    w_down = param(self, 'w_down', (self.d_ff, D), ('hidden', 'embed'), fan_in_normal(self.d_ff, self.out_scale))
    return gated(x_BTD, w_gate_up, w_down, self.activation)
