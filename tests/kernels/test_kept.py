"""What `model.remat` 'mixer' keeps: every kernel of a mixer runs once, where 'full' runs it again for its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels_pallas import (
    attention, attention_gpu, attention_tpu, lightning_gpu, lightning_tpu, msa_gpu, msa_tpu, sliding, sparse, warmup_tpu,
)
from mmx.kernels_pallas.chunks import Part
from mmx.layers.block import REMAT_POLICIES

B, T, H, K, DH = 1, 256, 4, 2, 128
array = lambda *shape: jax.ShapeDtypeStruct((B, T, *shape), jnp.bfloat16)
HEADS = array(H, DH), array(K, DH), array(K, DH)
INDEX = array(K, DH), array(DH)
SEGMENTS, SLOPES = jnp.ones((B, T), jnp.int32), jnp.full(H, 0.5)
PART = Part(np.arange(T, dtype=np.int32)[None], jnp.int32(0), SEGMENTS)
COUNTED = 'exp', 'exp2', 'wgmma_ref'


def lightning(function):
  return (array(H, DH),) * 3, lambda *qkv: function(*qkv, SLOPES, SEGMENTS, chunk=128)[0]


# What it is of, and the function of that.
FORMS = {
    'full, chunked': (HEADS, lambda *qkv: attention.attention_chunked(*qkv, SEGMENTS)),
    'full, a part': (HEADS, lambda *qkv: attention.attention_part(*qkv, SEGMENTS, PART)),
    'full, splash': (HEADS, lambda *qkv: attention.attention_splash(*qkv, SEGMENTS)),
    'full, TPU': (HEADS, lambda *qkv: attention_tpu.attention_pallas(*qkv, SEGMENTS)),
    'full, Hopper': (HEADS, lambda *qkv: attention_gpu.attention_hopper(*qkv, SEGMENTS)),
    'sliding': (HEADS, lambda *qkv: sliding.sliding_chunked(*qkv, SEGMENTS, PART.slots_nT, 64)),
    'sliding, splash': (HEADS, lambda *qkv: sliding.sliding_splash(*qkv, SEGMENTS, 64)),
    'lightning, TPU': lightning(lightning_tpu.lightning_pallas),
    'lightning, Hopper': lightning(lightning_gpu.lightning_hopper),
    'msa, gather': (HEADS + INDEX, lambda *a: sparse.msa_gather(*a, SEGMENTS, 64, 2)),
    'msa, warming up': (HEADS[:2] + INDEX, lambda *a: sparse.msa_prefix_kl_gather(*a, SEGMENTS)),
    'msa, warming up, TPU': (HEADS[:2] + INDEX, lambda *a: warmup_tpu.msa_prefix_kl_pallas(*a, SEGMENTS)),
    'msa, TPU': (HEADS + INDEX, lambda *a: msa_tpu.msa_pallas(*a, SEGMENTS, 64, 2)),
    'msa, Hopper': (HEADS + INDEX, lambda *a: msa_gpu.msa_hopper(*a, SEGMENTS, 64, 2)),
}


def work(form, remat):
  """Exponentials, and products of kernels for Hopper, in a gradient of the form; those within kernels too."""
  arguments, function = FORMS[form]
  # Something before it that is made again, and something behind it whose gradient asks for its output, if not for kl.
  behind = lambda out: jnp.tanh(out) if out.ndim > 1 else out
  scaled = lambda *a: jax.tree.map(behind, function(*(x * 2 for x in a)))
  block = scaled if remat == 'none' else jax.checkpoint(scaled, policy=REMAT_POLICIES[remat])
  total = lambda *a: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(block(*a)))
  return count(jax.make_jaxpr(jax.grad(total, range(len(arguments))))(*arguments).jaxpr)


def count(jaxpr):
  used = {id(variable) for eqn in jaxpr.eqns for variable in eqn.invars} | set(map(id, jaxpr.outvars))
  total = 0
  for eqn in jaxpr.eqns:
    # jax 0.10 leaves kernels, and jit around them, where nothing asks for them; XLA takes them out.
    left = eqn.primitive.name == 'jit' and not eqn.outvars
    left |= eqn.primitive.name == 'pallas_call' and not used & set(map(id, eqn.outvars))
    if not left:
      inner = (getattr(value, 'jaxpr', value) for value in jax.tree.leaves(list(eqn.params.values())))
      total += (eqn.primitive.name in COUNTED) + sum(count(jaxpr) for jaxpr in inner if hasattr(jaxpr, 'eqns'))
  return total


@pytest.mark.parametrize('form', FORMS)
def test_a_mixers_kernels_run_once_where_remat_keeps_them(form):
  none, mixer, full = (work(form, remat) for remat in ('none', 'mixer', 'full'))
  assert 0 < none == mixer < full
