"""The table of what has been proved ahead of time: every row compiled, one process each, for chips that are not here.

  pip install -e '.[aot]'
  python scripts/aot_matrix.py                   # all rows
  python scripts/aot_matrix.py --only=v5p:4x4x4  # rows whose name or slice holds that; the others stay as they are
  python scripts/aot_matrix.py --draw            # docs/aot.md from what is kept

A row is an arm of an experiment on a slice, by `python -m mmx.aot`. Figures are kept in docs/results/aot_matrix.json, and
docs/aot.md is their table. A row that does not fit is kept too, with what the compiler said.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / 'docs/results/aot_matrix.json', ROOT / 'docs/aot.md'
GIB = 2**30
M2 = '--config=experiments/m2_pretrain.py'
M3 = ('--config=configs/models/m3_428b.gin', '--set=model.moe.transport=direct', '--set=model.moe.capacity_factor=1.5',
      '--set=train.loss_chunk=65536', '--set=model.remat=mixer')
AT_4K = ('--config=configs/models/m2_230b.gin', '--set=data.seq_len=4096', '--set=data.batch_size=64',
         '--set=mesh.fsdp=1', '--set=mesh.expert=64', '--set=model.moe.transport=direct',
         '--set=model.moe.capacity_factor=1.5', '--set=train.loss_chunk=65536', '--set=model.remat=mixer')

SLICES = {'v5p_64': 'v5p:4x4x4', 'v5p_512': 'v5p:8x8x8', 'v6e_256': 'v6e:16x16', 'h200_32': 'h200:4x8'}

# what the row shows -> (topology, arguments of mmx.aot)
ROWS = {
    'M2, 4K, no MTP': ('v5p:4x4x4', AT_4K),
    'M2, 4K, no MTP, too large': ('v5p:2x4x4', (*AT_4K, '--set=mesh.expert=8', '--set=mesh.fsdp=4')),
    **{f'M2, {arm.upper()}, {scale}': (topology, (M2, f'--scale={scale}', f'--arm={arm}'))
       for scale, topology in SLICES.items() for arm in ('8k', '32k', '192k')},
    'M3, 8K': ('v5p:8x8x8', (*M3, '--set=data.seq_len=8192', '--set=data.batch_size=512', '--set=mesh.fsdp=8',
                             '--set=mesh.expert=64')),
    'M3, 128K': ('v5p:8x8x8', (*M3, '--set=data.seq_len=131072', '--set=data.batch_size=64', '--set=mesh.fsdp=1',
                               '--set=mesh.expert=64', '--set=mesh.context=8')),
}


def main():
  options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  options.add_argument('--only', default='', help='part of the names or slices of the rows to compile')
  options.add_argument('--draw', action='store_true', help='compile nothing, write the page')
  asked = options.parse_args()
  kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name, (topology, arguments) in ROWS.items():
    if asked.draw or asked.only not in f'{name} {topology}':
      continue
    kept[name] = prove(topology, arguments)
    RESULTS.write_text(json.dumps({name: kept[name] for name in ROWS if name in kept}, indent=1) + '\n')
    print(f'{name}: {" | ".join(cells(kept[name]))}', flush=True)
  PAGE.write_text(page(kept))


def prove(topology, arguments):
  """The record that `mmx.aot` writes, or what it says where the experiment does not fit."""
  command = ['mmx.aot', *arguments, f'--topology={topology}']
  with tempfile.NamedTemporaryFile(suffix='.json') as out:
    done = subprocess.run([sys.executable, '-m', *command, f'--json={out.name}'], cwd=ROOT, text=True,
                          capture_output=True)
    told = {'command': 'python -m ' + ' '.join(command), 'topology': topology}
    if done.returncode == 0:
      return json.loads(pathlib.Path(out.name).read_text()) | told
  errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  if not errors:
    sys.exit(f'{told["command"]} failed:\n{done.stderr[-2000:]}')
  return told | {'refused': errors[-1].removeprefix('error: '), 'date': datetime.date.today().isoformat()}


def cells(record):
  if 'refused' in record:
    return record['topology'], 'does not fit', '', '', '', '', ''
  gib = lambda size: f'{size / GIB:.1f}'
  mesh = ' x '.join(f'{axis} {size}' for axis, size in record['mesh'].items() if size > 1)
  low, high = (record['utilisation'][bound] for bound in ('most', 'least'))
  seconds = record['predicted_seconds']
  return (
      record['topology'], mesh, f'{gib(record["peak"])} of {gib(record["memory"])}',
      f'{record["peak"] / record["memory"]:.0%}', f'{seconds["least"]:.2f} to {seconds["most"]:.2f}',
      f'{low:.0%} to {high:.0%}', gib(sum(record['sent_by_kind'].values())),
  )


def page(kept):
  rows = '\n'.join(f'| {" | ".join((name, *cells(kept[name])))} |' for name in ROWS if name in kept)
  refused = '\n'.join(f'- {name}: {record["refused"]}' for name, record in kept.items() if 'refused' in record)
  missing = ', '.join(f'`{name}`' for name in ROWS if name not in kept)
  missing = f'\nNot compiled yet: {missing}.\n' if missing else ''
  versions = {f'{n} {v}' for r in kept.values() for n, v in r.get('versions', {}).items()}
  dates = sorted(record['date'] for record in kept.values())
  when = ' to '.join(dict.fromkeys((dates[0], dates[-1])))
  return f"""# Proved ahead of time

Programs compiled for chips that were not there (`python -m mmx.aot`): the whole training step with its optimizer, every
layer, for every chip. None of them has run. Regenerated by `python scripts/aot_matrix.py`.

| what | slice | mesh | GiB a chip, peak | | predicted s a step | of the peak, on the model | GiB sent a chip |
|---|---|---|---:|---:|---:|---:|---:|
{rows}

Predicted: each instruction as long as the longer of its products at the chip's peak and its bytes at the rate of its
memory, one after the other, experts evenly loaded; what is sent travels meanwhile (the lower time) or chips stand still
(the higher). Rates are the vendors'. Nothing is allowed for what a kernel does not reach of them, nor for the way to the
host's memory and back, where a stage uses it (M2, 192K, v6e_256: 4.4 GiB of each chip).

{refused}
{missing}
Compiled with {', '.join(sorted(versions))}, {when}. Figures: docs/results/aot_matrix.json.
"""


if __name__ == '__main__':
  main()
