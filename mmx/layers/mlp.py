"""Dense gated feed-forward."""

from flax import linen as nn

from mmx.kernels_pallas.gated import ACTIVATIONS
from mmx.sharding import cast, fan_in_normal, param


def gated(x_BTD, w_gate_DF, w_up_DF, w_down_FD, activation):
  """down(act(gate(x), up(x)))."""
  w_gate_DF, w_up_DF, w_down_FD = (cast(w, x_BTD.dtype) for w in (w_gate_DF, w_up_DF, w_down_FD))
  return ACTIVATIONS[activation](x_BTD @ w_gate_DF, x_BTD @ w_up_DF) @ w_down_FD


class MLP(nn.Module):
  """Parameters of `gated` with hidden width d_ff; `out_scale` shrinks the residual branch at the start."""

  d_ff: int
  activation: str
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x_BTD):
    D = x_BTD.shape[-1]
    w_gate = param(self, 'w_gate', (D, self.d_ff), ('embed', 'hidden'), fan_in_normal(D))
    w_up = param(self, 'w_up', (D, self.d_ff), ('embed', 'hidden'), fan_in_normal(D))
    w_down = param(self, 'w_down', (self.d_ff, D), ('hidden', 'embed'), fan_in_normal(self.d_ff, self.out_scale))
    return gated(x_BTD, w_gate, w_up, w_down, self.activation)
