"""Collectives and traffic of compiled programs, against what the program was written to do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mmx import hlo

LOOPS = 5


def read(function, *arguments):
  computations, entry = hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())
  return computations, hlo.runs(computations, entry)


def on_mesh(function, out_specs=P('x')):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  return jax.shard_map(function, mesh=mesh, in_specs=P('x'), out_specs=out_specs, check_vma=False)


@pytest.mark.parametrize('kind, function, sent', [
    ('all-gather', lambda x: jax.lax.all_gather(x, 'x', tiled=True)[: x.shape[0]], 7 * 16 * 4),
    ('all-reduce', lambda x: jax.lax.psum(x, 'x'), 2 * 16 * 4 * 7 / 8),
    ('reduce-scatter', lambda x: jnp.tile(jax.lax.psum_scatter(x, 'x', tiled=True), 8), 16 * 4 * 7 / 8),
    ('all-to-all', lambda x: jax.lax.all_to_all(x, 'x', 0, 0, tiled=True), 16 * 4 * 7 / 8),
    ('collective-permute', lambda x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % 8) for i in range(8)]), 16 * 4),
])
def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns(kind, function, sent):
  def looped(x):
    return jax.lax.fori_loop(0, LOOPS, lambda i, x: jnp.sin(function(x)), x)

  (found,) = hlo.collectives(*read(on_mesh(looped), jnp.ones(8 * 16)))
  assert (found.kind, found.count) == (kind, LOOPS)
  assert found.bytes == LOOPS * sent


def test_a_sum_that_is_scattered_within_a_fusion_counts_as_one():
  """As libtpu writes a reduce-scatter of what lies otherwise than it is to be scattered."""
  text = """
%all-reduce-scatter.1 (input.1: bf16[16,128]) -> bf16[4,128] {
  %input.1 = bf16[16,128]{1,0} parameter(0)
  %all-reduce.136 = bf16[16,128]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id.1 = u32[] partition-id()
  ROOT %dynamic-slice.2 = bf16[4,128]{1,0} dynamic-slice(%all-reduce.136, %partition-id.1), dynamic_slice_sizes={4,128}
}

ENTRY %main (x: bf16[16,128]) -> bf16[4,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  ROOT %fusion.33 = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
  computations, entry = hlo.parse(text)
  wanted = hlo.Collective('reduce-scatter', 4, 1, 16 * 128 * 2 * 3 / 4)
  assert hlo.collectives(computations, hlo.runs(computations, entry)) == [wanted]


def test_a_program_for_one_device_communicates_nothing():
  assert hlo.collectives(*read(lambda x: x @ x, jnp.ones((8, 8)))) == []


def test_traffic_is_operands_and_results_and_grows_with_the_loop():
  size = 256 * 256 * 4
  product = hlo.traffic(*read(lambda x: x @ x, jnp.ones((256, 256))))
  assert 2 * size <= product <= 4 * size
  loop = lambda n: hlo.traffic(*read(lambda x: jax.lax.fori_loop(0, n, lambda i, y: y @ x, x), jnp.ones((256, 256))))
  assert 3 * size <= (loop(9) - loop(3)) / 6 <= 5.1 * size  # a product, and maybe a copy


def test_a_loop_that_reads_one_layer_of_many_moves_that_layer():
  layers, x = jnp.ones((64, 128, 128)), jnp.ones((128, 128))
  scanned = hlo.traffic(*read(lambda layers, x: jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, layers)[0],
                              layers, x))
  assert 64 * 3 * x.nbytes <= scanned <= 64 * 8 * x.nbytes  # 64 times as much if each layer were all of them


def test_products_are_counted_in_fusions_and_as_often_as_their_loop_turns():
  left, right = jnp.ones((48, 32)), jnp.ones((32, 80))
  function = lambda left, right: jnp.tanh(left @ right).sum()
  once = sum(w.flops for w in hlo.work(*read(function, left, right)))
  assert once == pytest.approx(2 * 48 * 32 * 80)
  square = jnp.ones((64, 64))
  loop = lambda x: jax.lax.fori_loop(0, LOOPS, lambda i, y: jnp.sin(y @ x), x)
  assert sum(w.flops for w in hlo.work(*read(loop, square))) == pytest.approx(LOOPS * 2 * 64**3)


def test_a_slice_within_a_fusion_within_a_fusion_is_a_slice():
  program = """
%inner (a: f32[64,128], b: s32[]) -> f32[1,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %cut = f32[1,128]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,128}
}

%outer (c: s32[], d: f32[64,128]) -> f32[1,128] {
  %c = s32[] parameter(0)
  %d = f32[64,128]{1,0} parameter(1)
  %part = f32[1,128]{1,0} fusion(%d, %c), kind=kLoop, calls=%inner
  ROOT %sine = f32[1,128]{1,0} sine(%part)
}

ENTRY %main (e: f32[64,128], f: s32[]) -> f32[1,128] {
  %e = f32[64,128]{1,0} parameter(0)
  %f = s32[] parameter(1)
  ROOT %result = f32[1,128]{1,0} fusion(%f, %e), kind=kLoop, calls=%outer
}
"""
  computations, entry = hlo.parse(program)
  assert 2 * 512 <= hlo.traffic(computations, hlo.runs(computations, entry)) <= 2 * 512 + 8


def test_a_kernel_that_says_it_does_nothing_moves_nothing():
  call = 'custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"'
  stated = ',"cost_estimate":{"flops":"0","transcendentals":"0","bytes_accessed":"BYTES"}'
  program = f"""
ENTRY %main (a: f32[64]) -> f32[128] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %anything = f32[128]{{0}} {call}STATED}}}}
}}
"""
  for moves, wanted in (('0', []), ('512', [(True, 768)]), (None, [(True, 768)])):
    computations, entry = hlo.parse(program.replace('STATED', stated.replace('BYTES', moves) if moves else ''))
    done = hlo.work(computations, hlo.runs(computations, entry))
    assert [(work.kernel, work.bytes) for work in done] == wanted


def test_an_array_that_a_kernel_is_given_several_times_is_read_once():
  program = """
ENTRY %main (a: f32[64], b: f32[16]) -> f32[128] {
  %a = f32[64]{0} parameter(0)
  %b = f32[16]{0} parameter(1)
  ROOT %blocks = f32[128]{0} custom-call(%a, %b, %a, %a), custom_call_target="tpu_custom_call"
}
"""
  computations, entry = hlo.parse(program)
  assert hlo.traffic(computations, hlo.runs(computations, entry)) == 4 * (64 + 16 + 128)


@pytest.mark.parametrize('shape, size', [
    ('f32[]', 4), ('bf16[2,3]{1,0:T(8,128)(2,1)}', 12), ('(s32[4]{0}, (pred[8], f8e4m3fn[2,2]))', 28), ('token[]', 0),
])
def test_bytes_of_shapes(shape, size):
  assert hlo.bytes_of(shape) == size


TPU_PROGRAM = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %last = s32[]{:T(128)} constant(62), metadata={op_name="while"}
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %last), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%p.1), index=1
  %sum = f32[8]{0:T(128)} all-reduce(%x), replica_groups=mesh['a'=4,'b'=2,'c'=8] {'b','c'}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%i.1, %sum)
}

ENTRY %main (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0}) while(%q), condition=%condition, body=%body
}
"""


def test_loops_and_groups_are_read_as_the_tpu_compiler_writes_them():
  computations, entry = hlo.parse(TPU_PROGRAM)
  (found,) = hlo.collectives(computations, hlo.runs(computations, entry))
  assert (found.kind, found.group, found.count) == ('all-reduce', 16, 62)
  assert found.bytes == 62 * 2 * 32 * 15 / 16
