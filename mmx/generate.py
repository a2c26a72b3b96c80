"""Text from a checkpoint, token by token through each mixer's cache.

  python -m mmx.generate --checkpoint=runs/moe_ablation_cpu/e128_top8/seed0 --prompt='def main('
  python -m mmx.generate --checkpoint=IMPORTED --prompt='Hello' --temperature=0 --max_new_tokens=64

The prompt goes through the model in chunks of one shape (prefill), then every token alone (decode): two programs are
compiled, whatever the lengths. For serving many requests at once this is not the place.
"""

import functools
import logging
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmx import config
from mmx.command import errors_in_one_line, parser

PREFILL_CHUNK = 256  # tokens


class Sampling(NamedTuple):
  """How a token is chosen, of the first `vocab_size` ids: an embedding may have more rows than the tokenizer tokens."""

  vocab_size: int = 0  # 0 is all of the model's
  temperature: float = 0.0  # 0 is greedy
  top_k: int = 0  # 0 is all
  top_p: float = 1.0


def parse(argv):
  """The defaults of sampling are those published for M2."""
  options = parser('mmx.generate', __doc__)
  options.add_argument('--checkpoint', required=True, help='folder of a run, or of an imported checkpoint')
  options.add_argument('--prompt', default='', help='text to continue; a dash reads it from the standard input')
  options.add_argument('--max_new_tokens', type=int, default=256, help='tokens at most')
  options.add_argument('--temperature', type=float, default=1.0, help='0 takes the likeliest token (greedy)')
  options.add_argument('--top_k', type=int, default=40, help='only the k likeliest tokens; 0 is all')
  options.add_argument('--top_p', type=float, default=0.95, help='the likeliest tokens that hold this probability')
  options.add_argument('--seed', type=int, default=0, help='of the random choices')
  return options.parse_args(argv)


def main(argv=None) -> None:
  options = parse(argv)
  logging.getLogger('absl').setLevel(logging.WARNING)
  with errors_in_one_line():
    run(options)


def run(options) -> None:
  """Prints the prompt and, as it is made, what follows; the speed goes to the error stream."""
  if options.max_new_tokens < 1 or options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1:
    raise config.ConfigError('expected --max_new_tokens >= 1, --temperature >= 0, --top_k >= 0 and 0 < --top_p <= 1')
  experiment, vocabulary, variables = load(options.checkpoint)
  text = sys.stdin.read() if options.prompt == '-' else options.prompt
  prompt = vocabulary.encode(text).tolist() or [vocabulary.eos_id]  # nothing to continue: what a document starts with
  sampling = Sampling(vocabulary.vocab_size, options.temperature, options.top_k, options.top_p)
  tokens = generate(
      experiment.model, variables, [prompt], options.max_new_tokens, sampling, options.seed, vocabulary.eos_id
  )
  print(text, end='', flush=True)
  times = []

  def timed():
    for token_B in tokens:
      times.append(time.perf_counter())
      if (token := int(token_B[0])) != vocabulary.eos_id:
        yield token

  for piece in stream_text(vocabulary, timed()):
    print(piece, end='', flush=True)
  print()
  if len(times) > 2:  # the first waits for the compiler
    rate = (len(times) - 2) / (times[-1] - times[1])
    print(f'{len(prompt)} tokens in, {len(times)} out, {rate:.1f} tokens/s', file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def generate(model: config.ModelConfig, variables, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             sampling: Sampling = Sampling(), seed: int = 0, eos_id: int = -1) -> Iterator:
  """Continues B prompts of token ids together, each at its own length.

  variables: {'params', 'router'}. Rows that have ended with `eos_id` repeat it; all ended, or max_new_tokens, is the
  end.

  Yields:
    int32 numpy arrays [B], the next token of each row. The device is one token ahead of what is yielded.

  Raises:
    ConfigError: a prompt is empty or holds an id that the model has no row for.
  """
  import jax
  import numpy as np

  from mmx.model import init_cache

  for prompt in prompts:
    if not len(prompt) or min(prompt) < 0 or max(prompt) >= model.vocab_size:
      raise config.ConfigError(f'a prompt must hold tokens from 0 to {model.vocab_size - 1}, found {list(prompt)[:8]}')
  B, lengths_B = len(prompts), np.array([len(prompt) for prompt in prompts])
  longest = int(lengths_B.max())
  chunk = min(PREFILL_CHUNK, 1 << (longest - 1).bit_length())
  padded = longest + -longest % chunk
  tokens = np.zeros((B, padded), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  slot = np.arange(padded, dtype=np.int32)[None].repeat(B, 0)
  real = (slot < lengths_B[:, None]).astype(np.int32)

  length = longest + max_new_tokens
  cache = init_cache(model, B, length + -length % PREFILL_CHUNK)
  prefill, choose, decode = programs(model, sampling)
  logits_BV = np.zeros((B, model.vocab_size), np.float32)
  for start in range(0, padded, chunk):
    part = slice(start, start + chunk)
    logits_BV, cache = prefill(variables, cache, tokens[:, part], slot[:, part], real[:, part], logits_BV)
  key = jax.random.key(seed)
  token_B, ended_B = choose(logits_BV, key), np.zeros(B, bool)
  for step in range(max_new_tokens):
    following_B = None
    if step + 1 < max_new_tokens:  # on its way before the host looks at this one
      position_B = (lengths_B + step).astype(np.int32)
      following_B, cache = decode(variables, cache, token_B, position_B, jax.random.fold_in(key, step + 1))
    found_B = np.where(ended_B, eos_id, np.asarray(token_B)).astype(np.int32)
    yield found_B
    ended_B |= found_B == eos_id
    if ended_B.all():
      return
    token_B = following_B


@functools.cache
def programs(model: config.ModelConfig, sampling: Sampling):
  """(prefill, choose, decode), jitted; caches are donated.

  prefill(variables, cache, tokens [B, T], positions, segment_ids, logits [B, V]) -> (logits, cache): logits behind the
    last token of each row that has any among these, the given ones for the others.
  choose(logits [B, V], key) -> tokens int32 [B]. decode(variables, cache, tokens [B], positions [B], key) ->
    (next tokens [B], cache).
  """
  import jax
  import jax.numpy as jnp

  from mmx import sharding
  from mmx.model import Decoder

  decoder = Decoder(model, sharding.build_mesh(config.MeshConfig(num_devices=1)))  # which says what to compile for

  def logits_of(hidden_BD, head_DV):
    # The head in float32, as in training: rounding reorders likely tokens (MiniMax-M1 report, section 3.2).
    return jnp.einsum('bd,dv->bv', hidden_BD.astype(jnp.float32), head_DV, precision='float32')

  def prefill(variables, cache, tokens_BT, positions_BT, segment_ids_BT, logits_BV):
    out = decoder.apply(variables, tokens_BT, positions_BT, segment_ids_BT, cache)
    count_B1 = jnp.sum(segment_ids_BT > 0, axis=1, keepdims=True)
    last_BD = jnp.take_along_axis(out.hidden, jnp.maximum(count_B1 - 1, 0)[..., None], axis=1)[:, 0]
    return jnp.where(count_B1 > 0, logits_of(last_BD, out.head), logits_BV), out.cache

  def choose(logits_BV, key):
    return sample(logits_BV, key, sampling)

  def decode(variables, cache, token_B, position_B, key):
    one_B1 = jnp.ones_like(token_B)[:, None]
    out = decoder.apply(variables, token_B[:, None], position_B[:, None], one_B1, cache)
    return choose(logits_of(out.hidden[:, 0], out.head), key), out.cache

  return jax.jit(prefill, donate_argnums=1), jax.jit(choose), jax.jit(decode, donate_argnums=1)


def sample(logits_BV, key, sampling: Sampling):
  """Token ids int32 [B]. Temperature first, then the k likeliest, then the fewest of these that hold top_p of them."""
  import jax
  import jax.numpy as jnp

  logits_BV = logits_BV[:, : sampling.vocab_size or None]
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  V = logits_BV.shape[-1]
  logits_Bk, ids_Bk = jax.lax.top_k(logits_BV / sampling.temperature, min(sampling.top_k or V, V))
  probability_Bk = jax.nn.softmax(logits_Bk, axis=-1)
  before_Bk = jnp.cumsum(probability_Bk, axis=-1) - probability_Bk
  kept_Bk = (before_Bk < sampling.top_p).at[:, 0].set(True)
  choice_B = jax.random.categorical(key, jnp.where(kept_Bk, logits_Bk, -jnp.inf), axis=-1)
  return jnp.take_along_axis(ids_Bk, choice_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


# ----------------------------------------------------------------------------------------------------------------------
# in and out


def load(folder):
  """(experiment, tokenizer, variables) of a run folder or an imported checkpoint, for one device.

  A tokenizer file that lies in the folder goes before one of that name elsewhere.

  Raises:
    ConfigError, CheckpointError: there is no config.gin, no whole checkpoint, or the tokenizer is gone.
  """
  from mmx import checkpoint_params
  from mmx.data import tokenizer

  folder = pathlib.Path(folder)
  if not (folder / 'config.gin').is_file():
    raise config.ConfigError(f'{folder}: no config.gin here; give the folder of a run, such as runs/NAME/ARM/seed0')
  experiment = config.load((folder / 'config.gin').absolute())
  name = experiment.data.tokenizer
  vocabulary = tokenizer.load(str(folder / name) if (folder / name).is_file() else name)
  variables, _ = checkpoint_params.restore_params(folder, checkpoint_params.abstract_variables(experiment.model))
  return experiment, vocabulary, variables


def stream_text(vocabulary, tokens) -> Iterator[str]:
  """Pieces of text as soon as they are whole: a character's bytes may be spread over several tokens."""

  def text(ids):  # the byte tokenizer's surrogates, which no terminal takes, become the replacement character
    return vocabulary.decode(ids).encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')

  waiting, told = [], ''
  for token in tokens:
    waiting.append(token)
    whole = text(waiting)
    # Four bytes make a character; a replacement character older than that is really broken text.
    if not whole.endswith('\ufffd') or len(waiting) > 8:
      yield whole[len(told):]
      waiting, told = waiting[-1:], text(waiting[-1:])  # one token of context, as some tokenizers join with blanks
  if waiting and len(whole := text(waiting)) > len(told):
    yield whole[len(told):]


if __name__ == '__main__':
  main()
