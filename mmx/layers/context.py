"""What every layer of one forward pass sees besides its input."""

import jax
from flax import struct


@struct.dataclass
class Context:
  """Where the tokens stand.

  positions_BT: int32, within the document; with a cache also the token's slot in it.
  segment_ids_BT: int32, 0 is padding. Without a cache, documents of a packed row are numbered 1, 2, ...; with a cache a
    row is one document, and 0 marks padding behind it.
  warmup: None, or a bool scalar: MSA attends to everything and learns to score blocks (MSA, section 3.2).
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array
  warmup: jax.Array | None = None
