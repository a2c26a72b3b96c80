"""The mixers a pattern can name. A new mixer is one file plus one line in MIXERS.

A mixer is a linen module called as `mixer(x_BTD, positions_BT, segment_ids_BT) -> y_BTD`.
"""

from mmx.config import ModelConfig
from mmx.layers.attention import Attention


def full(model: ModelConfig, out_scale, mesh):
  """Causal softmax attention over the whole document."""
  return Attention(model.attention, model.norm_eps, out_scale, mesh, name='mixer')


MIXERS = {'full': full}
