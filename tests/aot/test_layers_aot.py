"""Layers in their loop, for TPUs that are not here."""

import re

import jax
import jax.numpy as jnp

from mmx.layers.mlp import gated

LAYERS, T, D, F = 5, 512, 256, 1024


def test_matrices_of_all_layers_are_not_held_once_more_in_the_dtype_of_products(compile_for_tpu):
  def loss(weights, x):
    layer = jax.checkpoint(lambda x, w: x + gated(x, *w, 'swiglu'))
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].astype(jnp.float32).sum()

  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16)
  text = compile_for_tpu(jax.grad(loss), (array(LAYERS, D, F), array(LAYERS, D, F), array(LAYERS, F, D)), x).as_text()
  assert not re.search(rf'= bf16\[{LAYERS},({D},{F}|{F},{D})\]', text)
