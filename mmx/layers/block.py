"""One decoder block, and what its backward pass recomputes."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from mmx import sharding
from mmx.config import Layer, ModelConfig, num_layers
from mmx.layers.mixer import MIXERS
from mmx.layers.mlp import MLP
from mmx.layers.moe import MoE
from mmx.layers.norm import RMSNorm

REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,  # least memory: the whole block again
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights
    'mixer': jax.checkpoint_policies.save_only_these_names('mixer'),  # keep each mixer's output: attention runs once
}


class Block(nn.Module):
  """Pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x)). Returns (x [B, T, D], MoEAux or None)."""

  layer: Layer
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segment_ids_BT):
    m = self.model
    out_scale = (2 * num_layers(m.pattern)) ** -0.5  # residual branches add up to unit variance (GPT-2)
    mixer = MIXERS[self.layer.mixer](m, out_scale, self.mesh)
    y_BTD = mixer(RMSNorm(m.norm_eps, name='mixer_norm')(x_BTD), positions_BT, segment_ids_BT)
    x_BTD = x_BTD + checkpoint_name(y_BTD, 'mixer')
    h_BTD = RMSNorm(m.norm_eps, name='ffn_norm')(x_BTD)
    if self.layer.ffn == 'moe':
      y_BTD, aux = MoE(m.moe, out_scale, self.mesh, name='ffn')(h_BTD, segment_ids_BT > 0)
    else:
      y_BTD, aux = MLP(m.d_ff, out_scale, name='ffn')(h_BTD), None
    return sharding.constrain(x_BTD + y_BTD, self.mesh, 'batch', None, None), aux


def remat_block(model: ModelConfig):
  """`Block`, wrapped in the policy that `model.remat` names."""
  if model.remat == 'none':
    return Block
  return nn.remat(Block, policy=REMAT_POLICIES[model.remat], prevent_cse=model.layer_loop == 'unroll')
