"""Dense gated feed-forward."""

from flax import linen as nn
from jax.sharding import Mesh

from mmx.kernels_pallas.gated import ACTIVATIONS
from mmx.sharding import fan_in_normal, param, product

UP_AXES, DOWN_AXES = ('embed', 'hidden'), ('hidden', 'embed')


def gated(x_BTD, w_gate_DF, w_up_DF, w_down_FD, activation, mesh=None):
  """down(act(gate(x), up(x)))."""
  gate_BTF, up_BTF = (product(x_BTD, w, UP_AXES, mesh) for w in (w_gate_DF, w_up_DF))
  return product(ACTIVATIONS[activation](gate_BTF, up_BTF), w_down_FD, DOWN_AXES, mesh)


class MLP(nn.Module):
  """Parameters of `gated` with hidden width d_ff; `out_scale` shrinks the residual branch at the start."""

  d_ff: int
  activation: str
  out_scale: float
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD):
    D = x_BTD.shape[-1]
    w_gate = param(self, 'w_gate', (D, self.d_ff), UP_AXES, fan_in_normal(D))
    w_up = param(self, 'w_up', (D, self.d_ff), UP_AXES, fan_in_normal(D))
    w_down = param(self, 'w_down', (self.d_ff, D), DOWN_AXES, fan_in_normal(self.d_ff, self.out_scale))
    return gated(x_BTD, w_gate, w_up, w_down, self.activation, self.mesh)
