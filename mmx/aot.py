"""Whether an experiment fits, compiles and communicates as planned on chips that are not here. Needs the extra `aot`.

  pip install -e '.[aot]'
  python -m mmx.aot --config=experiments/moe_ablation.py --scale=v5p_64 --arm=e128_top8 --topology=v5p:4x4x4
  python -m mmx.aot --config=configs/models/m2_230b.gin --topology=v5e:8x8 --mode=decode --set mesh.tensor=8 ...
  python -m mmx.aot --config=experiments/m2_pretrain.py --scale=v5p_64 --topology=v5p:4x4x4 --find

Compiles the very training step that `mmx.train` would run, or a step of serving, for every chip of the slice, and reads
off the program what each chip holds and sends. Exits with 1 where it does not fit. `--find` does so for every mesh that
the slice and the experiment allow, two minutes or more each at M2's size, and ends with the fastest predicted that fits.
"""

import collections
import dataclasses
import datetime
import itertools
import json
import logging
import math
import sys
from importlib import metadata

from mmx import config, topology
from mmx.command import errors_in_one_line, parser
from mmx.proof import PROGRAMS, DoesNotFit, Proof, prove
from mmx.topology import GIB

FOUND_AXES = ('fsdp', 'expert', 'tensor', 'context')  # replica holds what fsdp would split and sends no less


def parse(argv):
  """The flags; `--json` files are what scripts/aot_matrix.py gathers."""
  options = parser('mmx.aot', __doc__)
  options.add_argument('--config', required=True, help='experiment: a .py file with get_config, or a .gin file')
  options.add_argument('--scale', default='cpu', help='size of the experiment, as its file allows')
  options.add_argument('--arm', help="one of the experiment's arms; the first if left out")
  options.add_argument('--set', action='append', default=[], help='override one field, as mesh.expert=64; repeatable')
  options.add_argument('--topology', required=True, help='chips, as v5p:4x4x4, v6e:16x16 or h200:4x8')
  options.add_argument('--mode', choices=sorted(PROGRAMS), default='train', help='a training step, or one of serving: '
                       'prefill of rows of data.seq_len tokens, or decode of one token each against as many')
  options.add_argument('--find', action='store_true', help='try every mesh and take the fastest predicted that fits')
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
    if options.find:
      proof = find(experiment, options.topology, options.mode)
    else:
      proof = prove(experiment, options.topology, options.mode)
  except DoesNotFit as refused:
    sys.exit(f'error: {refused}\n{advice(experiment)}')
  print(describe(proof))
  if options.json:
    with open(options.json, 'w') as out:
      json.dump(record(proof), out, indent=1)
  if proof.peak > proof.memory:  # compilers for GPUs do not refuse
    needed = f'{proof.peak / GIB:.1f} GiB at once, a chip has {proof.memory / GIB:.1f}'
    sys.exit(f'error: --topology={options.topology}: {needed}\n{advice(experiment)}')


def find(experiment: config.Experiment, name: str, mode: str) -> Proof:
  """The proof of the mesh whose predicted time is the least of those that fit; a line for each that is tried.

  Raises:
    DoesNotFit: none does.
    ConfigError: no mesh suits the experiment.
  """
  tried = list(meshes(experiment, name, mode))
  if not tried:
    raise config.ConfigError(f'--find: no mesh of {name} divides the rows, experts and heads of the experiment')
  proofs = []
  for number, candidate in enumerate(tried, start=1):
    shown = ' x '.join(f'{axis} {getattr(candidate.mesh, axis)}' for axis in FOUND_AXES)
    try:
      proof = prove(candidate, name, mode)
      fits = proof.peak <= proof.memory
      proofs += [proof] if fits else []
      told = f'{proof.peak / GIB:6.1f} GiB, {proof.least:.2f} to {proof.most:.2f} s' + ('' if fits else ', does not fit')
    except DoesNotFit:
      told = 'does not fit'
    except config.ConfigError as error:
      told = str(error).removeprefix(f'--topology={name}: ')
    print(f'[{number}/{len(tried)}] {shown}: {told}', file=sys.stderr, flush=True)
  if not proofs:
    raise DoesNotFit(f'--topology={name}: none of {len(tried)} meshes fits')
  return min(proofs, key=lambda proof: proof.most)


def meshes(experiment: config.Experiment, name: str, mode: str):
  """The experiment on every mesh over FOUND_AXES of which each axis is a product of sides of the slice, and which the
  experiment's shapes allow."""
  _, _, chips = topology.parse(name)
  sides = [side for side in map(int, name.partition(':')[2].split('x')) if side > 1]
  seen = set()
  for axes in itertools.product(FOUND_AXES, repeat=len(sides)):
    sizes = {f'mesh.{axis}': math.prod(s for s, a in zip(sides, axes) if a == axis) for axis in FOUND_AXES}
    if tuple(sizes.values()) in seen or mode != 'train' and sizes['mesh.context'] > 1:
      continue
    seen.add(tuple(sizes.values()))
    try:
      yield config.validate(config.override(experiment, sizes | {'mesh.replica': 1}), chips)
    except config.ConfigError:
      continue


def advice(experiment: config.Experiment) -> str:
  """What would take less memory, the most telling first."""
  m, mesh = experiment.model, experiment.mesh
  ways = [
      (m.remat not in ('full', 'offload'), f"--set model.remat=full keeps one activation a layer; it is {m.remat!r}"),
      (m.remat == 'full', "--set model.remat=offload keeps each layer's one activation in the host's memory"),
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
      f'{proof.topology}: {proof.chips} chips, mesh {mesh}' + ('' if proof.mode == 'train' else f', {proof.mode}'),
      f'parameters     {proof.parameters / 1e9:,.2f}B, {proof.active / 1e9:.2f}B active; '
      f'{proof.tokens:,} tokens a step',
      f'memory a chip  arguments {gib(proof.arguments)}, temporaries {gib(proof.temporaries)}, peak {gib(proof.peak)} '
      f'of {gib(proof.memory)} ({proof.peak / proof.memory:.0%})',
      f'work a chip    {proof.model_flops / 1e12:,.1f} TFLOP of the model, {proof.executed_flops / 1e12:,.1f} of '
      f'the program; {proof.traffic / GIB:,.0f} GiB of memory traffic at most',
      'collectives' + ('' if by_layer else '    none'), *by_layer,
      f'time           compute {seconds["compute"]:.4g} s, memory {seconds["memory"]:.4g} s, links '
      f'{seconds["links"]:.4g} s, each alone at the rate its vendor states',
      f'predicted      {proof.least:.4g} s a step if what is sent travels while chips work '
      f'({proof.utilisation(proof.least):.1%} of the peak at work on the model),',
      f'               {proof.most:.4g} s if chips stand still meanwhile ({proof.utilisation(proof.most):.1%});',
      '               each instruction as long as the longer of its products at the peak and its bytes at the rate of',
      '               the memory, one after the other, experts evenly loaded',
      f'compiled in    {proof.compile_seconds:.0f} s with {gib(proof.host_memory)} of this host\'s memory',
  ])


def record(proof: Proof) -> dict:
  """The proof for a JSON file, with versions and date."""
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
  try:
    return bool(metadata.version(name))
  except metadata.PackageNotFoundError:
    return False


if __name__ == '__main__':
  main()
