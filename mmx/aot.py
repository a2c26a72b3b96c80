"""Whether an experiment fits, compiles and communicates as planned on chips that are not here. Needs the extra `aot`.

  pip install -e '.[aot]'
  python -m mmx.aot --config=experiments/moe_ablation.py --scale=v5p_64 --arm=e128_top8 --topology=v5p:4x4x4

Compiles the very training step that `mmx.train` would run, for every chip of the slice, and reads off the program what
each chip holds and sends. Exits with 1 where it does not fit.
"""

import collections
import dataclasses
import json
import logging
import math
import resource
import sys
import time

from mmx import config, flops, hlo, topology
from mmx.command import errors_in_one_line, parser
from mmx.topology import GIB


@dataclasses.dataclass(frozen=True)
class Proof:
  """What is known of one step of an experiment on a slice. Bytes, FLOPs and seconds are of one chip and one step."""

  topology: str
  chips: int
  mesh: dict[str, int]
  parameters: int
  active: int
  tokens: int  # of a step, all chips
  arguments: int  # parameters, optimizer state and batch
  temporaries: int
  peak: int  # what is alive at once at most, arguments included
  memory: float  # of the chip
  model_flops: float  # that the model needs, as in MFU
  executed_flops: float  # of the program: with what is computed again
  traffic: float  # bytes read and written, at most
  collectives: list[hlo.Collective]
  # compute, memory, links: each alone at full rate. chip: instructions one after the other, each as long as the longer
  # of its products and its bytes.
  seconds: dict[str, float]
  compile_seconds: float
  host_memory: int  # of the compiling process, at most

  @property
  def least(self) -> float:
    """Seconds of a step if chips never wait for each other: what they send travels while they work."""
    return max(self.seconds['chip'], self.seconds['links'])

  @property
  def most(self) -> float:
    """Seconds of a step if chips stand still while anything travels."""
    return self.seconds['chip'] + self.seconds['links']

  def utilisation(self, seconds) -> float:
    return self.model_flops / self.executed_flops * self.seconds['compute'] / seconds


def executed(work: list[hlo.Work], fill, mixing_flops) -> list[hlo.Work]:
  """`work` with the FLOPs that kernels do: those of experts state full buffers, of which `fill` is full where loads are
  even; those of attention state none and share `mixing_flops`."""
  silent = sum(w.kernel and not w.flops for w in work)

  def true(w):
    if not w.kernel:
      return w
    return dataclasses.replace(w, flops=w.flops * fill if w.flops else mixing_flops / silent)

  return [true(w) for w in work]


class DoesNotFit(RuntimeError):
  """The compiler refused the program for want of memory; the message is its line."""


def parse(argv):
  options = parser('mmx.aot', __doc__)
  options.add_argument('--config', required=True, help='experiment: a .py file with get_config, or a .gin file')
  options.add_argument('--scale', default='cpu', help='size of the experiment, as its file allows')
  options.add_argument('--arm', help="one of the experiment's arms; the first if left out")
  options.add_argument('--set', action='append', default=[], help='override one field, as mesh.expert=64; repeatable')
  options.add_argument('--topology', required=True, help='chips, as v5p:4x4x4, v6e:16x16 or h200:4x8')
  options.add_argument('--json', help='file to write the figures to')
  return options.parse_args(argv)


def main(argv=None) -> None:
  options = parse(argv)
  logging.getLogger('absl').setLevel(logging.WARNING)
  with errors_in_one_line():
    run(options)


def run(options) -> None:
  """Prints the proof; ends with 1 and with advice where the experiment does not fit."""
  topology.parse(options.topology)  # before anything slow
  file = config.load_experiment(options.config, options.scale)
  experiment = config.select_arm(file, options.arm or next(iter(file.arms)))
  for assignment in options.set:
    experiment = config.override(experiment, dict([config.parse_assignment(assignment)]))
  try:
    proof = prove(experiment, options.topology)
  except DoesNotFit as refused:
    sys.exit(f'error: {refused}\n{advice(experiment)}')
  print(describe(proof))
  if options.json:
    with open(options.json, 'w') as out:
      json.dump(record(proof), out, indent=1)


def prove(experiment: config.Experiment, name: str) -> Proof:
  """Compiles the training step for the topology `name`.

  Raises:
    ConfigError: the configuration does not suit that many chips.
    DoesNotFit: the compiler says that memory does not suffice.
  """
  import jax

  from mmx import sharding, train_step

  _, chip, chips = topology.parse(name)
  config.validate(experiment, chips)
  devices = topology.devices_of(name)
  try:
    mesh = sharding.build_mesh(experiment.mesh, devices)
  except (NotImplementedError, ValueError) as error:
    sizes = config.resolve_mesh(experiment.mesh, chips)
    raise config.ConfigError(
        f'--topology={name}: mesh {sizes} cannot be laid on it: each axis must be a product of sides of the slice'
    ) from error
  platform = {'gpu': 'cuda'}.get(sharding.platform_of(mesh), sharding.platform_of(mesh))
  began = time.perf_counter()
  traced = train_step.trace_train_step(experiment, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # else kernels ask this host what kind of chip it is
    lowered = traced.lower(lowering_platforms=(platform,))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise DoesNotFit(f'--topology={name}: {_one_line(error)}') from error
    raise
  compile_seconds = time.perf_counter() - began

  memory = compiled.memory_analysis()
  computations, entry = hlo.parse(compiled.as_text())
  times = hlo.runs(computations, entry)
  collectives = hlo.collectives(computations, times)
  count, model = flops.count_parameters(experiment.model), experiment.model
  tokens = experiment.data.batch_size * experiment.data.seq_len
  model_flops = flops.step_flops(experiment) * tokens / chips
  again = 4 / 3 if model.remat == 'full' else 1
  work = executed(hlo.work(computations, times), fill(experiment, mesh), again * mixing_flops(experiment) / chips)
  executed_flops, traffic = sum(w.flops for w in work), sum(w.bytes for w in work)
  peak_flops = flops.peak_flops(devices[0], model.compute_dtype)
  return Proof(
      topology=name, chips=chips, mesh=dict(mesh.shape), parameters=count.total, active=count.active, tokens=tokens,
      arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes,
      peak=memory.peak_memory_in_bytes, memory=chip.memory, model_flops=model_flops, executed_flops=executed_flops,
      traffic=traffic, collectives=collectives,
      seconds={
          'compute': executed_flops / peak_flops,
          'memory': traffic / chip.memory_rate,
          'links': sum(c.bytes for c in collectives) / chip.links,
          'chip': sum(max(w.flops / peak_flops, w.bytes / chip.memory_rate) for w in work),
      },
      compile_seconds=compile_seconds, host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  )


def fill(experiment: config.Experiment, mesh) -> float:
  """Share of the rows kept for experts that come where loads are even."""
  from mmx.layers import moe_transport

  moe, shards = experiment.model.moe, mesh.shape['expert']
  tokens = experiment.data.batch_size * experiment.data.seq_len // experiment.train.accumulate
  N = tokens * mesh.shape['tensor'] // mesh.size
  capacity = moe_transport.capacity_of(N, moe.top_k, moe.num_experts, moe.capacity_factor)
  return min(1.0, N * moe.top_k / moe_transport.rows_kept(N, moe.top_k, moe.num_experts, shards, capacity))


def mixing_flops(experiment: config.Experiment) -> float:
  """FLOPs of a step between tokens, forward and backward, which attention's kernels spend: all chips."""
  model, T = experiment.model, experiment.data.seq_len
  layers = [layer for s in config.parse_pattern(model.pattern) for layer in s.unit * s.repeats]
  layers += layers[-1:] * model.mtp.depth
  tokens = experiment.data.batch_size * T
  return 3 * tokens * sum(flops.mixing_flops(model, layer.mixer, T) for layer in layers)


def _one_line(error) -> str:
  return ' '.join(str(error).removeprefix('RESOURCE_EXHAUSTED: ').split())


def advice(experiment: config.Experiment) -> str:
  """What would take less memory, the most telling first."""
  m, mesh = experiment.model, experiment.mesh
  ways = [
      (m.remat != 'full', f"--set model.remat=full keeps one activation a layer; it is {m.remat!r}"),
      (m.moe.capacity_factor == 0 and mesh.expert > 1,
       '--set model.moe.capacity_factor=1.5 bounds what an expert may receive; dropless, buffers hold the worst case'),
      (not experiment.train.loss_chunk, '--set train.loss_chunk=8192 makes logits in pieces'),
      (True, f'--set train.accumulate={2 * experiment.train.accumulate} halves the rows at work at once'),
      (True, 'a larger slice with mesh.fsdp or mesh.expert larger splits parameters and moments further'),
  ]
  return '\n'.join(f'  {line}' for applies, line in ways if applies)


def describe(proof: Proof) -> str:
  """The proof for a terminal."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in proof.mesh.items() if size > 1) or 'one chip'
  gib = lambda size: f'{size / GIB:,.2f} GiB'
  seconds = proof.seconds
  by_layer = [
      f'  {c.kind:20s} in groups of {c.group:<4d} {c.count:6,d} a step {c.bytes / GIB:9.2f} GiB sent a chip'
      for c in proof.collectives
  ]
  return '\n'.join([
      f'{proof.topology}: {proof.chips} chips, mesh {mesh}',
      f'parameters     {proof.parameters / 1e9:,.2f}B, {proof.active / 1e9:.2f}B active; '
      f'{proof.tokens / 1e6:.2f}M tokens a step',
      f'memory a chip  arguments {gib(proof.arguments)}, temporaries {gib(proof.temporaries)}, peak {gib(proof.peak)} '
      f'of {gib(proof.memory)} ({proof.peak / proof.memory:.0%})',
      f'work a chip    {proof.model_flops / 1e12:,.1f} TFLOP of the model, {proof.executed_flops / 1e12:,.1f} of '
      f'the program; {proof.traffic / GIB:,.0f} GiB of memory traffic at most',
      'collectives' + ('' if by_layer else '    none'), *by_layer,
      f'time           compute {seconds["compute"]:.2f} s, memory {seconds["memory"]:.2f} s, links '
      f'{seconds["links"]:.2f} s, each alone at the rate its vendor states',
      f'predicted      {proof.least:.2f} s a step if what is sent travels while chips work '
      f'({proof.utilisation(proof.least):.0%} of the peak at work on the model), {proof.most:.2f} s if they stand still '
      f'meanwhile ({proof.utilisation(proof.most):.0%});',
      '               each instruction as long as the longer of its products at the peak and its bytes at the rate of the '
      'memory, experts evenly loaded',
      f'compiled in    {proof.compile_seconds:.0f} s with {gib(proof.host_memory)} of this host\'s memory',
  ])


def record(proof: Proof) -> dict:
  """The proof for a JSON file, with versions and date."""
  import datetime
  from importlib import metadata

  versions = {name: metadata.version(name) for name in ('jax', 'libtpu') if _installed(name)}
  totals = collections.Counter()
  for c in proof.collectives:
    totals[c.kind] += c.bytes
  predicted = {'least': proof.least, 'most': proof.most}
  return dataclasses.asdict(proof) | {
      'sent_by_kind': dict(totals), 'predicted_seconds': predicted,
      'utilisation': {name: proof.utilisation(s) for name, s in predicted.items() if math.isfinite(s) and s},
      'versions': versions, 'date': datetime.date.today().isoformat(),
  }


def _installed(name) -> bool:
  from importlib import metadata

  try:
    return bool(metadata.version(name))
  except metadata.PackageNotFoundError:
    return False


if __name__ == '__main__':
  main()
