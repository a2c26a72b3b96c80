"""Scores of all arms side by side: the table of task x length x arm, what it says, and the heat map.

Reads what run.py left under 'ruler' in the results that mmx/report.py compares, and adds to what that wrote.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from etils import epath

from mmx.metrics import RunWriter, write_whole
from mmx.report import (
    CONFIDENCE,
    Difference,
    Result,
    load_results,
    markdown_table,
    nan_to_none,
    paired_difference,
    t_half_width,
    terminal_table,
)

NAMES = {
    'niah_single': 'single needle', 'niah_multikey': 'multi-key needle', 'niah_multivalue': 'multi-value needles',
    'niah_multiquery': 'multi-query needles', 'vt': 'variable tracking', 'cwe': 'common words', 'fwe': 'frequent words',
}


@dataclass(frozen=True)
class Cell:
  """One arm in one task at one length."""

  task: str
  length: int
  arm: str
  scores: dict[int, float]  # by seed
  half_width: float  # of the 95% t-interval of their mean; of one seed, over its documents

  @property
  def mean(self) -> float:
    return float(np.mean(list(self.scores.values())))

  def minus(self, other: 'Cell') -> Difference:
    """Paired by seed."""
    return paired_difference(self.arm, self.scores, other.arm, other.scores)


class Table:
  """Cells by (task, length) and arm, in the order of the results."""

  def __init__(self, results: Sequence[Result]):
    self.arms = list(dict.fromkeys(result.arm for result in results if result.values.get('ruler')))
    self.cells: dict[tuple[str, int], dict[str, Cell]] = {}
    for arm in self.arms:
      runs = [result for result in results if result.arm == arm and result.values.get('ruler')]
      for task, lengths in runs[0].values['ruler'].items():
        for length in lengths:
          found = {run.seed: run.number(f'ruler.{task}.{length}.score') for run in runs}
          spread = float(np.std(list(found.values()), ddof=1)) if len(found) > 1 else math.nan
          within = runs[0].number(f'ruler.{task}.{length}.half_width')
          half_width = float(t_half_width(spread, len(found))) if len(found) > 1 else within
          self.cells.setdefault((task, int(length)), {})[arm] = Cell(task, int(length), arm, found, half_width)

  def scores(self) -> list[list[str]]:
    """Rows to print: a task and length each, an arm a column."""
    shown = lambda cell: _plus_minus(cell.mean, cell.half_width, '.3f') if cell else ''
    body = [
        [task, str(length), *(shown(by_arm.get(arm)) for arm in self.arms)]
        for (task, length), by_arm in self.cells.items()
    ]
    return [['task', 'length', *self.arms], *body]

  def differences(self) -> list[list[str]]:
    """Rows to print: each arm minus the first, paired by seed, with a star where the interval excludes 0."""
    first, *others = self.arms

    def shown(cell, reference):
      if cell is None or reference is None or not (difference := cell.minus(reference)).seeds:
        return ''
      star = '*' if difference.beyond_noise else ''
      return _plus_minus(difference.mean, difference.half_width, '+.3f') + star

    body = [
        [task, str(length), *(shown(by_arm.get(arm), by_arm.get(first)) for arm in others)]
        for (task, length), by_arm in self.cells.items()
    ]
    return [['task', 'length', *(f'{arm} − {first}' for arm in others)], *body]

  def rankings(self) -> list[str]:
    """'vt at 512: full 0.830 > msa 0.794 ≈ lightning 0.785': > where the pairs of seeds differ by more than noise."""
    sentences = []
    for (task, length), by_arm in self.cells.items():
      best, *rest = sorted(by_arm.values(), key=lambda cell: -cell.mean)
      sentence = f'{task} at {length}: {best.arm} {best.mean:.3f}'
      for better, worse in zip([best, *rest], rest):
        sentence += f' {">" if better.minus(worse).beyond_noise else "≈"} {worse.arm} {worse.mean:.3f}'
      sentences.append(sentence)
    return sentences

  def to_markdown(self) -> str:
    parts = ['## Long context (RULER)', self._legend(), markdown_table(self.scores())]
    if len(self.arms) > 1:
      parts += [markdown_table(self.differences()), '\n'.join(f'- {sentence}' for sentence in self.rankings())]
    return '\n\n'.join([*parts, '![scores by task, length and arm](ruler.png)']) + '\n'

  def to_terminal(self) -> str:
    parts = [terminal_table(self.scores())]
    if len(self.arms) > 1:
      parts += [terminal_table(self.differences()), '\n'.join(f'→ {sentence}' for sentence in self.rankings())]
    return '\n\n'.join(parts) + '\n'

  def to_json(self) -> list[dict]:
    return [
        asdict(cell) | {'mean': cell.mean} for by_arm in self.cells.values() for cell in by_arm.values()
    ]

  def _legend(self) -> str:
    several = any(len(cell.scores) > 1 for by_arm in self.cells.values() for cell in by_arm.values())
    unit = 'seeds; differences are paired by seed, * where the interval excludes 0' if several else 'documents'
    what = 'Share of the expected answers found, by length in tokens.'
    return f'{what} ± is the {CONFIDENCE:.0%} t-interval over {unit}.'

  def heat_map(self) -> bytes:
    """PNG: a panel for each task, arms down, lengths across, each score written in its cell."""
    from matplotlib.figure import Figure  # without pyplot: no global state and no display

    tasks = list(dict.fromkeys(task for task, _ in self.cells))
    lengths = sorted({length for _, length in self.cells})
    size = (1.6 + len(tasks) * (0.6 + 0.8 * len(lengths)), 1.3 + 0.5 * len(self.arms))
    canvas = Figure(figsize=size, dpi=150, layout='constrained')
    for panel, task in zip(canvas.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks):
      grid = np.full((len(self.arms), len(lengths)), np.nan)
      for (row, arm), (column, length) in itertools.product(enumerate(self.arms), enumerate(lengths)):
        if cell := self.cells.get((task, length), {}).get(arm):
          grid[row, column] = cell.mean
          dark = cell.mean < 0.6
          panel.text(column, row, f'{cell.mean:.2f}', ha='center', va='center', color='white' if dark else 'black')
      image = panel.imshow(grid, cmap='viridis', vmin=0, vmax=1, aspect='auto')
      panel.set_title(NAMES.get(task, task), fontsize=10)
      panel.set_xticks(range(len(lengths)), lengths)
      panel.set_yticks(range(len(self.arms)), self.arms)
      panel.set_xlabel('tokens')
    canvas.colorbar(image, ax=canvas.axes, label='score')
    png = io.BytesIO()
    canvas.savefig(png, format='png')
    return png.getvalue()


def _plus_minus(mean: float, half_width: float, style: str) -> str:
  return format(mean, style) + ('' if math.isnan(half_width) else f' ± {half_width:.3f}')


def append(root: str | os.PathLike, arms: Sequence[str] | None = None) -> str:
  """Adds the scores to summary.md and summary.json, writes ruler.png and the TensorBoard run `summary/ruler`.

  To be called whenever `mmx.report.write` has written those anew.

  Returns:
    the table for the terminal; '' where no run has scores, and then nothing is written.
  """
  root = epath.Path(root)
  table = Table(load_results(root, arms))
  if not table.cells:
    return ''
  png, markdown = table.heat_map(), table.to_markdown()
  write_whole(root / 'ruler.png', png)
  write_whole(root / 'summary.md', (root / 'summary.md').read_text() + f'\n{markdown}')
  content = json.loads((root / 'summary.json').read_text()) | {'ruler': nan_to_none(table.to_json())}
  write_whole(root / 'summary.json', json.dumps(content, indent=2, allow_nan=False) + '\n')
  writer = RunWriter(root / 'summary' / 'ruler')
  writer.text('ruler', markdown)
  writer.image(0, 'ruler', png)
  writer.close()
  return table.to_terminal()
