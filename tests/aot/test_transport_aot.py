"""Experts' rows between TPU chips that are not here: sent as they lie."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from mmx import hlo, sharding, topology
from mmx.config import MeshConfig
from mmx.kernels_pallas import api
from mmx.layers import moe_transport
from mmx.layers.moe_transport import Experts, expert_parallel

B, T, D, F, E, K = 16, 1024, 1024, 512, 32, 4


@pytest.mark.parametrize('transport', ['ragged', 'direct'])
@pytest.mark.parametrize('name', ['v5p:2x2x4', 'v6e:4x4'])
def test_rows_are_neither_laid_out_anew_nor_zeroed_before_they_travel(name, transport):
  mesh = sharding.build_mesh(MeshConfig(fsdp=1, expert=16), topology.devices_of(name))
  choice = {'implementation': 'megablox', 'platform': 'tpu', 'activation': 'swiglu'}
  experts = Experts(functools.partial(api.experts, **choice), functools.partial(api.experts_on_rows, **choice))

  def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec_of(axes, shape, mesh)))

  tokens = 'batch', 'length', None
  floats = (
      array((B, T, D), jnp.bfloat16, *tokens), array((B, T, K), jnp.float32, *tokens),
      array((E, D, F), jnp.bfloat16, *moe_transport.GATE_AXES),
      array((E, D, F), jnp.bfloat16, *moe_transport.UP_AXES),
      array((E, F, D), jnp.bfloat16, *moe_transport.DOWN_AXES),
  )  # fmt: skip

  def total(x_BTD, weights_BTk, w_gate_EDF, w_up_EDF, w_down_EFD, ids_BTk):
    y_BTD, _ = expert_parallel(
        x_BTD, ids_BTk, weights_BTk, w_gate_EDF, w_up_EDF, w_down_EFD, mesh=mesh, transport=transport,
        capacity_factor=1.5, experts=experts,
    )
    return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(jax.grad(total, range(5))).trace(*floats, array((B, T, K), jnp.int32, *tokens))
    text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  computations, entry = hlo.parse(text)
  every = {i.name: i for name in hlo.runs(computations, entry) for i in computations[name]}
  row = 2 * D  # bytes
  journeys = [i for i in every.values() if i.opcode == 'ragged-all-to-all' and i.bytes >= B * T * K // 16 * row]
  assert len(journeys) == 4  # tokens and results, forward and backward
  assert all('anything' in every[journey.operands[1]].rest for journey in journeys)
  assert not [i for i in every.values() if i.opcode == 'broadcast' and i.bytes >= journeys[0].bytes / 2]
  assert not re.search(rf'bf16\[\d+,2,{D // 2}\]', text)  # tiles of two rows
