"""One decoder block, and what its backward pass recomputes."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from mmx import sharding
from mmx.config import Layer, ModelConfig, num_layers
from mmx.layers.context import Context
from mmx.layers.mixer import MIXERS
from mmx.layers.mlp import MLP
from mmx.layers.moe import MoE
from mmx.layers.norm import Norm

_named = jax.checkpoint_policies.save_only_these_names('mixer')  # by `chunks.kept`


def _of_mixers(primitive, *avals, **params):
  """Whether a result is of a mixer's kernel, cuDNN's among them, which names none."""
  return primitive.name == 'dot_product_attention_fwd_wrapper' or _named(primitive, *avals, **params)


REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,  # least memory: the whole block again
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights
    'mixer': _of_mixers,  # keep what the mixers' kernels return: they run once, and products again
    # The whole block again, from an input that has been in the host's memory meanwhile.
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['input'], offload_src='device',
        offload_dst='pinned_host',
    ),
}


class Block(nn.Module):
  """Mixer and feed-forward, each a residual branch of a norm.

  Returns (x [B, T, D], the layer's cache, aux): aux holds what the branches tell the training step, {'mixer': IndexAux,
  'ffn': MoEAux}, without those that tell nothing.
  """

  layer: Layer
  model: ModelConfig
  mesh: Mesh | None

  @nn.compact
  def __call__(self, x_BTD, context: Context, layer_index, cache):
    m = self.model
    out_scale = branch_scale(m)
    x_BTD = checkpoint_name(x_BTD, 'input')
    mixer = MIXERS[self.layer.mixer].layer(m, out_scale, self.mesh, name='mixer')
    normed_BTD = Norm(m.norm, m.norm_eps, name='mixer_norm')(x_BTD)
    y_BTD, cache, mixer_aux = mixer(normed_BTD, context, layer_index, cache)
    kind = 'lightning' if self.layer.mixer == 'lightning' else 'attention'
    x_BTD = add_branch(m, kind, x_BTD, normed_BTD, y_BTD)

    normed_BTD = Norm(m.norm, m.norm_eps, name='ffn_norm')(x_BTD)
    if self.layer.ffn == 'moe':
      ffn = MoE(m.moe, m.activation, out_scale, self.mesh, name='ffn')
      y_BTD, ffn_aux = ffn(normed_BTD, context.segment_ids_BT > 0)
    else:
      y_BTD, ffn_aux = MLP(m.d_ff, m.activation, out_scale, self.mesh, name='ffn')(normed_BTD), None
    x_BTD = add_branch(m, 'ffn', x_BTD, normed_BTD, y_BTD)
    aux = {name: value for name, value in (('mixer', mixer_aux), ('ffn', ffn_aux)) if value is not None}
    return sharding.constrain(x_BTD, self.mesh, 'batch', 'length', None), cache, aux


def add_branch(model: ModelConfig, kind, x, normed, branch):
  """The residual stream behind branch = f(normed), normed = norm(x), by `model.residual`.

  pre_norm: x + branch (M2, M3). post_norm: alpha * normed + beta * branch, with the factors of `kind`: the stream
  itself is the normed one (Text-01 and M1; DeepNorm, MiniMax-01 section 2.1).
  """
  if model.residual == 'pre_norm':
    return x + branch
  alpha, beta = (getattr(model.post_norm, f'{kind}_{factor}') for factor in ('alpha', 'beta'))
  return alpha * normed + beta * branch


def branch_scale(model: ModelConfig) -> float:
  """Initial scale of a branch's last product: branches add up to unit variance (GPT-2), or DeepNorm's (8N)^(-1/4)."""
  layers = num_layers(model.pattern)
  return (2 * layers) ** -0.5 if model.residual == 'pre_norm' else (8 * layers) ** -0.25


def remat_block(model: ModelConfig):
  """`Block`, wrapped in the policy that `model.remat` names."""
  if model.remat == 'none':
    return Block
  return nn.remat(Block, policy=REMAT_POLICIES[model.remat], prevent_cse=model.layer_loop == 'unroll')
