"""MiniMax Sparse Attention: the mixer 'msa'."""

import jax
from flax import struct


@struct.dataclass
class IndexAux:
  """What one layer's index branch tells the training step. All float32."""

  kl: jax.Array  # mean over queries and kv heads of KL(teacher || index branch), in nats
  block_recall: jax.Array  # share of the best top_k blocks, by the teacher's mass, that were selected
  score_recall: jax.Array  # share of the teacher's mass that the selected blocks hold
