"""The mixers a pattern can name. A new mixer is one file plus one line in MIXERS.

A mixer is a linen module, called as `mixer(x_BTD, context, layer_index, cache) -> (y_BTD, cache, aux)`. `layer_index`
(int32) counts the model's layers from 0. Without a cache, the rows of x are packed documents (training). With one, each
row is a document whose T next tokens stand at context.positions_BT: T > 1 is prefill, whole or continued, T = 1 decode.
`aux` is None or what the training step adds to the loss (sparse.IndexAux).
"""

from collections.abc import Callable
from typing import NamedTuple

from mmx.layers import attention, lightning, sliding, sparse


class Mixer(NamedTuple):
  """layer(model, out_scale, mesh, name=...) -> module; init_cache(model, batch, max_length, dtype) -> its cache."""

  layer: Callable
  init_cache: Callable


MIXERS = {
    'full': Mixer(attention.Attention, attention.init_cache),
    'sliding': Mixer(sliding.Sliding, sliding.init_cache),
    'lightning': Mixer(lightning.Lightning, lightning.init_cache),
    'msa': Mixer(sparse.SparseAttention, sparse.init_cache),
}
