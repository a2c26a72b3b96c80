"""The one schema: frozen dataclasses under `Experiment`. A default stands here and nowhere else.

Files, experiments and flags only fill them in (mmx/config.py, from where everybody imports these names).
Letters: D d_model, H heads, K kv heads, Dh head dim, E experts, F their hidden.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention of the mixers full, sliding and msa (M2 report, section 2.1)."""

  num_heads: int = 4  # H, query heads
  num_kv_heads: int = 2  # K, each shared by H/K query heads
  head_dim: int = 32  # Dh
  rotary_dim: int = 16  # the first rotary_dim of Dh rotate (partial RoPE)
  rope_theta: float = 10_000.0
  qk_norm: Literal['none', 'full_width', 'per_head'] = 'full_width'  # Text-01; M2: one norm over all heads; M3: each
  qk_init: Literal['independent', 'equal'] = 'independent'  # 'equal': tokens match themselves at the start, every mixer
  implementation: Literal['auto', 'reference', 'chunked', 'cudnn', 'splash', 'pallas', 'hopper'] = 'auto'


@dataclass(frozen=True)
class SlidingConfig:
  """Sliding-window attention with the heads of `attention` (the hybrids of M2 report, section 2.2.2)."""

  window: int = 64  # W, keys a query sees, its own included
  sink_tokens: int = 0  # first tokens of the document that every query sees as well
  implementation: Literal['auto', 'reference', 'chunked', 'splash', 'pallas', 'hopper'] = 'auto'


@dataclass(frozen=True)
class LightningConfig:
  """Linear attention with one decay per head and layer (MiniMax-01, section 2.2)."""

  num_heads: int = 4  # H, of queries and keys alike
  head_dim: int = 32  # Dh; the state of a head is [Dh, Dh]
  chunk: int = 64  # tokens computed as one block
  norm_eps: float = 1e-6  # of the output norm
  implementation: Literal['auto', 'reference', 'chunked', 'pallas', 'hopper'] = 'auto'


@dataclass(frozen=True)
class MSAConfig:
  """MiniMax Sparse Attention with the heads of `attention` (arXiv:2606.13392)."""

  block_size: int = 16  # b, keys of a block
  top_k: int = 4  # blocks per query and kv head, its own block among them
  index_dim: int = 32  # width of an index head; its first attention.rotary_dim rotate
  index_norm: Literal['none', 'per_head'] = 'per_head'  # the paper has none; M3 norms each index head
  index_dtype: Literal['compute', 'float8_e4m3fn'] = 'compute'  # of index queries and keys; float8 halves keys' cache
  kl_weight: float = 1.0  # lambda, on the sum over layers of KL(teacher || index branch)
  warmup_steps: int = 0  # optimizer steps with full attention, KL over the whole causal prefix
  implementation: Literal['auto', 'reference', 'gather', 'pallas', 'hopper'] = 'auto'


@dataclass(frozen=True)
class PostNormConfig:
  """x = norm(x); x = alpha * x + beta * f(x): the factors of Text-01 and M1, used when model.residual = 'post_norm'."""

  attention_alpha: float = 1.0  # Text-01: 3.5565588200778455, DeepNorm's (2 * 80)^(1/4)
  attention_beta: float = 1.0
  lightning_alpha: float = 1.0
  lightning_beta: float = 1.0
  ffn_alpha: float = 1.0
  ffn_beta: float = 1.0


@dataclass(frozen=True)
class MoEConfig:
  """Sparse feed-forward layer: gate, experts, balance, and how tokens travel between expert shards."""

  num_experts: int = 32  # E
  top_k: int = 2  # experts per token
  d_ff: int = 256  # F, hidden width of one expert
  gate: Literal['sigmoid', 'softmax'] = 'sigmoid'
  routed_scaling: float = 1.0  # factor on the routed sum (M3: 2.0)
  shared_d_ff: int = 0  # hidden width of the always-on shared expert; 0 is none
  bias_update_rate: float = 1e-3  # step of the selection-only expert bias (aux-loss-free balancing); 0 freezes it
  balance_loss_weight: float = 0.0  # coefficient of the Switch-style balance loss
  capacity_factor: float = 0.0  # 0 is dropless; otherwise each expert keeps ceil(factor * tokens * top_k / E) per shard
  transport: Literal['ring', 'ragged', 'padded', 'direct'] = 'ring'  # used when mesh.expert > 1
  implementation: Literal['auto', 'reference', 'loop', 'blocks', 'megablox', 'hopper'] = 'auto'  # of experts


@dataclass(frozen=True)
class MTPConfig:
  """Multi-token prediction: `depth` sequential modules, each predicting one token further (M2 report, section 2.3)."""

  depth: int = 0  # modules; 0 is off
  weight: float = 0.3  # loss weight until the learning-rate decay begins
  final_weight: float = 0.1  # reached linearly at the end of the decay


@dataclass(frozen=True)
class ModelConfig:
  """A decoder: `pattern` names each layer's mixer and, after a slash, its feed-forward ('moe' if left out).

  Grammar: items separated by blanks; `item*n` repeats; parentheses group. Each top-level item is one scanned segment:
  'full*62', '(lightning*7 full)*10', 'full/dense*3 full*57'.
  """

  vocab_size: int = 264  # rows of the embedding; at least the tokenizer's vocabulary
  d_model: int = 128  # D
  pattern: str = 'full*2'
  d_ff: int = 512  # hidden width of dense feed-forward layers
  norm: Literal['rms', 'gemma'] = 'rms'  # Text-01, M2: times w; M3: times 1 + w, before the cast
  norm_eps: float = 1e-6
  residual: Literal['pre_norm', 'post_norm'] = 'pre_norm'  # M2, M3; Text-01 and M1, with the factors of `post_norm`
  activation: Literal['swiglu', 'swiglu_oai'] = 'swiglu'  # Text-01, M2; M3: clamped at 7, sigmoid(1.702 gate), up + 1
  key_shift: Literal['none', 'learned'] = 'none'  # keys see the token before theirs too: small models learn recall
  tie_embeddings: bool = False
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'  # parameters are float32 always
  remat: Literal['none', 'full', 'dots', 'mixer', 'offload'] = 'none'  # recomputed backwards; see layers/block.py
  layer_loop: Literal['scan', 'unroll'] = 'scan'  # same parameters and values either way; unrolling compiles slower
  attention: AttentionConfig = field(default_factory=AttentionConfig)
  sliding: SlidingConfig = field(default_factory=SlidingConfig)
  lightning: LightningConfig = field(default_factory=LightningConfig)
  msa: MSAConfig = field(default_factory=MSAConfig)
  post_norm: PostNormConfig = field(default_factory=PostNormConfig)
  moe: MoEConfig = field(default_factory=MoEConfig)
  mtp: MTPConfig = field(default_factory=MTPConfig)


@dataclass(frozen=True)
class DataConfig:
  """Tokens in. `source` is a weighted mixture: 'kind:path@weight' items separated by blanks (see data/sources.py)."""

  source: str = 'stdlib'  # stdlib | text:DIR | jsonl:DIR_OR_FILE | arrayrecord:DIR_OR_FILE | synthetic:TASK | ruler:...
  tokenizer: str = 'byte'  # 'byte', 'symbols' (for ruler:) or the path of a tokenizer.json
  text_field: str = 'text'  # field of a JSONL row that holds the document
  seq_len: int = 256  # T, tokens per row of a batch
  batch_size: int = 16  # rows per optimizer step over all processes
  packing: Literal['concat', 'first_fit', 'best_fit'] = 'concat'
  heldout_fraction: float = 0.05  # share of documents, chosen by content hash, never trained on
  seed: int = 0  # order of documents
  num_workers: int = 0  # grain worker processes; 0 reads in the training process


@dataclass(frozen=True)
class OptimConfig:
  """AdamW with decoupled decay on matrices only; the schedule is a function of the optimizer step."""

  name: Literal['adamw'] = 'adamw'
  learning_rate: float = 3e-3  # peak
  schedule: Literal['wsd', 'cosine', 'constant'] = 'wsd'  # warm-up, stable, decay
  warmup_steps: int = 20
  decay_steps: int = 60  # length of the final decay under 'wsd'
  final_lr_ratio: float = 0.1  # last learning rate over the peak
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # global gradient norm; 0 is no clipping


@dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  steps: int = 200  # optimizer steps
  seed: int = 0  # initial parameters
  init_from: str = ''  # parameters to start from: a checkpoint folder, or another arm of the experiment (same seed)
  accumulate: int = 1  # microbatches per optimizer step
  loss_chunk: int = 0  # tokens per chunk of head and cross-entropy; 0 is all at once
  z_loss_weight: float = 0.0  # coefficient of mean(logsumexp(logits)^2)
  log_every: int = 10  # steps between scalars
  histogram_every: int = 50  # steps between expert-load histograms
  checkpoint_every: int = 100  # steps between checkpoints; one is always written at the end
  keep_checkpoints: int = 2  # newest ones kept
  local_checkpoint_every: int = 0  # steps between checkpoints on every host's own disk, the newest kept; 0 is none
  local_checkpoint_dir: str = '/tmp/mmx'  # of each host
  spike_deviations: float = 0.0  # a loss or log gradient norm so far above its running mean is a spike; 0 looks for none
  skip_spikes: bool = False  # a batch that is a spike, or not finite, updates nothing
  max_skips: int = 10  # batches skipped in a row that end the run
  hang_timeout: float = 0.0  # seconds without a step after which a process says where it hangs and ends; 0 is never


@dataclass(frozen=True)
class EvalConfig:
  """Held-out loss and bits per byte."""

  every: int = 50  # steps; also after the last
  batches: int = 8  # batches of data.batch_size rows, the same ones each time


@dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1, 'what is left'. Rows of a batch are split over the first three."""

  replica: int = 1  # parameters repeated
  fsdp: int = -1  # parameters and optimizer state split
  expert: int = 1  # experts split, tokens travel
  tensor: int = 1  # heads and hidden widths split
  context: int = 1  # tokens of a row split, and with them what every layer holds of it
  num_devices: int = 0  # devices used; 0 is all


@dataclass(frozen=True)
class Experiment:
  """Everything that decides a run."""

  name: str = 'mmx'
  model: ModelConfig = field(default_factory=ModelConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)


class ConfigError(ValueError):
  """A configuration a person can mend; the message is one line that names file, line, field and what is allowed."""


# --- layer patterns ---------------------------------------------------------------------------------------------------

# Names of layers/mixer.py, repeated here because this file imports no layers; a test compares them.
MIXERS = ('full', 'sliding', 'lightning', 'msa')
FFNS = ('moe', 'dense')


@dataclass(frozen=True)
class Layer:
  """What one layer consists of, by name."""

  mixer: str
  ffn: str


@dataclass(frozen=True)
class Segment:
  """`repeats` times the layers of `unit`: one scan."""

  unit: tuple[Layer, ...]
  repeats: int


@functools.cache
def parse_pattern(pattern: str) -> tuple[Segment, ...]:
  """Segments of a layer pattern; the grammar stands at `ModelConfig`.

  'full/dense*3 (lightning*7 full)*10' is two segments: one dense layer, three times, and a unit of eight, ten times.
  Only a top-level item is scanned; repeats inside a group are written out in its unit.

  Raises:
    ConfigError: names the column, what stands there and what may.
  """
  tokens = [(match.group(), match.start() + 1) for match in re.finditer(r'[()*]|[^\s()*]+', pattern)]
  tokens.append(('the end', len(pattern) + 1))
  position = 0

  def fail(expected):
    found, column = tokens[position]
    raise ConfigError(f'model.pattern = {pattern!r}, column {column}: expected {expected}, found {found}')

  def item():
    """One layer or group with its repeat -> Segment."""
    nonlocal position
    word, column = tokens[position]
    if word == '(':
      position += 1
      unit = sum((segment.unit * segment.repeats for segment in items()), ())
      if tokens[position][0] != ')':
        fail(f"')' for the '(' of column {column}")
    elif word in (')', '*', 'the end'):
      fail('a layer')
    else:
      mixer, slash, ffn = word.partition('/')
      if mixer not in MIXERS:
        fail(f'a mixer ({", ".join(MIXERS)})')
      if slash and ffn not in FFNS:
        fail(f'{mixer}/ and a feed-forward ({", ".join(FFNS)})')
      unit = (Layer(mixer, ffn or FFNS[0]),)
    position += 1
    repeats = 1
    if tokens[position][0] == '*':
      position += 1
      if not re.fullmatch(r'[1-9][0-9]*', tokens[position][0]):
        fail('a number of repeats, at least 1')
      repeats = int(tokens[position][0])
      position += 1
    return Segment(unit, repeats)

  def items():
    """Items up to a closing parenthesis or the end."""
    found = [item()]
    while tokens[position][0] not in (')', 'the end'):
      found.append(item())
    return found

  segments = items()
  if tokens[position][0] == ')':
    fail('a layer or the end')
  return tuple(segments)


def num_layers(pattern: str) -> int:
  """Layers of a pattern, all repeats counted."""
  return sum(segment.repeats * len(segment.unit) for segment in parse_pattern(pattern))
