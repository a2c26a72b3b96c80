"""Finished runs side by side: the comparison table, the sentence that says what it means, and the figure.

Reads `<root>/<arm>/seed<k>/result.json`. The arms of an experiment share data order and seeds, so each arm is compared
with the first one seed by seed; the spread of those paired differences is the noise that a difference must exceed.
"""

import io
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from etils import epath
from scipy.special import stdtrit  # inverse of Student's t distribution; scipy.stats would take a second to import

from mmx.metrics import RunWriter, short_number, write_whole

CONFIDENCE = 0.95
COLUMNS = 96  # of a terminal
MOST_SEEDS = 10_000  # beyond this, 'how many seeds' is no longer advice
UNITS = {'heldout_loss': 'nats per token', 'train_loss': 'nats per token', 'heldout_bpb': 'bits per byte'}
TITLES = {'heldout_loss': 'held-out loss', 'train_loss': 'training loss', 'heldout_bpb': 'bits/byte'}
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')  # Okabe and Ito
RELATION = 'Published at another scale, on other text, by another metric: these runs neither replicate nor refute it.'


class ReportError(RuntimeError):
  """Runs that cannot be compared; the message is one line that names the file or folder."""


@dataclass(frozen=True)
class Result:
  """One finished run; `values` is its `result.json`."""

  arm: str
  seed: int
  values: Mapping[str, Any]

  def number(self, path: str) -> float:
    """The number at a dotted path ('params.total'), or NaN where the run does not have it."""
    value: Any = self.values
    for key in path.split('.'):
      value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan

  def curve(self) -> dict[int, float]:
    """Held-out loss by tokens seen; of a run without a curve, its last point."""
    curve = self.values.get('curve') or {}
    points = dict(zip(curve.get('tokens', ()), curve.get('heldout_loss', ()), strict=False))
    return points or {int(self.values.get('tokens') or 0): self.number('heldout_loss')}


@dataclass(frozen=True)
class Arm:
  """Means over the seeds of one arm; NaN where no run has the number."""

  name: str
  seeds: tuple[int, ...]  # those with a finite metric
  mean: float
  deviation: float  # standard deviation between seeds; NaN for one seed
  means: Mapping[str, float]  # further numbers, by dotted path


@dataclass(frozen=True)
class Difference:
  """An arm minus the first arm, seed by seed."""

  arm: str
  against: str
  seeds: tuple[int, ...]  # seeds that both arms have
  mean: float
  deviation: float  # of the paired differences
  half_width: float  # of the 95% t-interval; NaN for fewer than two pairs
  seeds_needed: int | None  # pairs at which a difference of this size would stand out; None: unknown, or too many

  @property
  def beyond_noise(self) -> bool:
    return abs(self.mean) > self.half_width  # False for a NaN half-width


@dataclass(frozen=True)
class Summary:
  """The comparison, ready to be printed; `arms[0]` is what the others are compared with."""

  metric: str
  arms: tuple[Arm, ...]
  differences: tuple[Difference, ...]
  notes: tuple[str, ...]  # what a reader must know before believing the table
  facts: str  # one line: steps, tokens, corpus, device
  published: str  # markdown
  docs: str  # what the experiment asks; its first line is the title

  def sentences(self) -> list[str]:
    return [_sentence(difference, UNITS.get(self.metric, '')) for difference in self.differences]

  def to_markdown(self) -> str:
    title, _, body = self.docs.strip().partition('\n')
    published = f'## Published\n\n{self.published.strip()}\n\n{RELATION}' if self.published.strip() else ''
    parts = [
        f'# {title or "Comparison"}', body.strip(), self.facts, markdown_table(self._quality()),
        self._legend(), *(f'**{sentence}**' for sentence in self.sentences()), markdown_table(self._cost()),
        '\n'.join(f'- {note}' for note in self.notes), published,
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'

  def to_terminal(self) -> str:
    title = self.docs.strip().partition('\n')[0]
    published = f'Published:\n{self.published.strip()}\n{_wrapped("", RELATION)}' if self.published.strip() else ''
    parts = [
        '\n'.join(_wrapped('', line) for line in (title, self.facts) if line),
        terminal_table(self._quality()) + ('\n' + _wrapped('', self._legend()) if self._legend() else ''),
        '\n'.join(_wrapped('→ ', sentence) for sentence in self.sentences()), terminal_table(self._cost()),
        '\n'.join(_wrapped('note: ', note) for note in self.notes), published,
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'

  def to_json(self) -> str:
    """Everything above as strict JSON: what is not a number is null."""
    content = {
        **asdict(self), 'sentences': self.sentences(), 'confidence': CONFIDENCE,
        'differences': [{**asdict(d), 'beyond_noise': d.beyond_noise} for d in self.differences],
    }
    return json.dumps(nan_to_none(content), indent=2, allow_nan=False) + '\n'

  def _quality(self) -> list[list[str]]:
    first = self.arms[0].name
    rows = [['arm', 'seeds', TITLES.get(self.metric, self.metric), 'bits/byte', f'minus {first}, {CONFIDENCE:.0%} CI']]
    differences = {difference.arm: difference for difference in self.differences}
    for arm in self.arms:
      spread = '' if math.isnan(arm.deviation) else f' ± {arm.deviation:.4f}'
      difference = differences.get(arm.name)
      rows.append([
          arm.name, str(len(arm.seeds)), _number(arm.mean) + spread,
          '' if self.metric == 'heldout_bpb' else _number(arm.means['heldout_bpb']),
          _interval(difference) if difference else '',
      ])
    return _without_empty_columns(rows)

  def _cost(self) -> list[list[str]]:
    rows = [['arm', 'parameters', 'active', 'tokens/s', 'MFU', 'load max/mean']]
    for arm in self.arms:
      mfu, load = arm.means['mfu'], arm.means['load_max_over_mean']
      counts = [self._with_ratio(arm, path) for path in ('params.total', 'params.active', 'tokens_per_second')]
      rows.append([arm.name, *counts, _number(mfu, '.1%'), _number(load, '.2f')])
    return _without_empty_columns(rows)

  def _with_ratio(self, arm: Arm, path: str) -> str:
    value, reference = arm.means[path], self.arms[0].means[path]
    if math.isnan(value):
      return ''
    if arm is self.arms[0] or not reference > 0:
      return short_number(value)
    digits = 2 if path == 'tokens_per_second' else 3  # parameters are to agree within 1%
    return f'{short_number(value)} ×{value / reference:.{digits}f}'

  def _legend(self) -> str:
    """What the two ± mean; they differ, because pairing takes out what the seeds have in common."""
    spread = '± of an arm: standard deviation over its seeds. ' if any(a.deviation > 0 for a in self.arms) else ''
    paired = f'minus {self.arms[0].name}: mean over pairs of runs of one seed and data order, and its 95% interval.'
    return spread + (paired if self.differences else '')


# --- reading ----------------------------------------------------------------------------------------------------------


def load_results(root: str | os.PathLike, arms: Sequence[str] | None = None) -> list[Result]:
  """Every `<root>/<arm>/seed<k>/result.json`, arm by arm and seed by seed.

  Args:
    root: folder of an experiment, on a disk or such as gs://bucket/folder.
    arms: which arms, if finished, and in which order; all, in natural order (e32 before e128), if left out.

  Raises:
    ReportError: nothing has finished, or a file is not a result.
  """
  root = epath.Path(root)
  results = [_read_result(path) for path in root.glob('*/seed*/result.json')]
  order = list(arms or sorted({result.arm for result in results}, key=_natural))
  results = sorted((r for r in results if r.arm in order), key=lambda r: (order.index(r.arm), r.seed))
  if not results:
    wanted = f' of {", ".join(arms)}' if arms else ''
    raise ReportError(f'{root}: no finished run{wanted}; expected <arm>/seed<k>/result.json')
  return results


def _read_result(path: epath.Path) -> Result:
  try:
    values = json.loads(path.read_text())
    return Result(arm=str(values['arm']), seed=int(values['seed']), values=values)
  except (KeyError, TypeError, ValueError) as error:
    what = f'{type(error).__name__}: {error}'
    raise ReportError(f'{path}: not a result ({what}); "arm" and "seed" are required') from error


def _natural(name: str) -> list[Any]:
  return [(0, int(part), '') if part.isdigit() else (1, 0, part) for part in re.split(r'(\d+)', name) if part]


# --- comparing --------------------------------------------------------------------------------------------------------


def summarize(results: Sequence[Result], metric: str = 'heldout_loss', published: str = '', docs: str = '') -> Summary:
  """Compare every arm with the first one.

  Args:
    results: of one or more arms; the first arm is the reference.
    metric: key of `result.json` to compare by.
    published: markdown shown beside the table, never mixed with it.
    docs: what the experiment asks; the first line becomes the title.

  Raises:
    ReportError: no results, or none with a finite `metric`.
  """
  by_arm: dict[str, list[Result]] = {}
  for result in results:
    by_arm.setdefault(result.arm, []).append(result)
  values = {
      arm: {run.seed: run.number(metric) for run in runs if math.isfinite(run.number(metric))}
      for arm, runs in by_arm.items()
  }
  if not any(values.values()):
    raise ReportError(f'no run has a finite {metric!r}')
  arms = tuple(_arm(name, values[name], runs) for name, runs in by_arm.items())
  first = arms[0].name
  differences = tuple(paired_difference(arm.name, values[arm.name], first, values[first]) for arm in arms[1:])
  return Summary(
      metric=metric, arms=arms, differences=differences, notes=tuple(_notes(by_arm, arms, differences, metric)),
      facts=_facts(results), published=published, docs=docs,
  )


def paired_difference(arm: str, ours: Mapping[int, float], against: str, theirs: Mapping[int, float]) -> Difference:
  """Mean of `ours - theirs` over the seeds (the keys) that both have, with its 95% Student t-interval."""
  seeds = tuple(sorted(ours.keys() & theirs.keys()))
  pairs = np.array([ours[seed] - theirs[seed] for seed in seeds])
  mean = float(pairs.mean()) if len(pairs) else math.nan
  deviation = float(pairs.std(ddof=1)) if len(pairs) > 1 else math.nan
  half_width = float(t_half_width(deviation, len(pairs))) if len(pairs) > 1 else math.nan
  return Difference(arm, against, seeds, mean, deviation, half_width, seeds_needed(mean, deviation))


def t_half_width(deviation: float, count: Any) -> Any:
  """Half the 95% interval of a mean: t(0.975, count - 1) * deviation / sqrt(count); `count` may be an array."""
  return stdtrit(count - 1, (1 + CONFIDENCE) / 2) * deviation / np.sqrt(count)


def seeds_needed(mean: float, deviation: float) -> int | None:
  """The smallest number of pairs whose interval, at this spread, is narrower than a difference of this size."""
  counts = np.arange(2, MOST_SEEDS + 1)
  enough = t_half_width(deviation, counts) < abs(mean)
  return int(counts[np.argmax(enough)]) if enough.any() else None


def _arm(name: str, values: Mapping[int, float], runs: Sequence[Result]) -> Arm:
  paths = (
      'heldout_loss', 'heldout_bpb', 'train_loss', 'tokens_per_second', 'mfu', 'load_max_over_mean', 'router_entropy',
      'params.total', 'params.active', 'params.active_without_router', 'params.router', 'flops_per_token',
      'wall_seconds',
  )
  numbers = list(values.values())
  return Arm(
      name=name, seeds=tuple(sorted(values)), mean=float(np.mean(numbers)) if numbers else math.nan,
      deviation=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan,
      means={path: _mean(run.number(path) for run in runs if run.seed in values) for path in paths},
  )


def _mean(numbers: Iterable[float]) -> float:
  finite = [number for number in numbers if math.isfinite(number)]
  return sum(finite) / len(finite) if finite else math.nan


def _sentence(difference: Difference, unit: str) -> str:
  """What the interval means, in words."""
  seeds, half = len(difference.seeds), difference.half_width
  if not seeds:
    return f'{difference.arm} and {difference.against} have no seed in common: they cannot be compared.'
  digits = _digits(difference)
  way = 'lower' if difference.mean < 0 else 'higher'
  size = f'{difference.arm} is {way} than {difference.against} by {abs(difference.mean):.{digits}f}'
  unit = f' {unit}' if unit else ''
  if seeds == 1:
    return f'{size}{unit} with one seed: one seed cannot tell a difference from the noise; run at least three.'
  measured = f'{size} ± {half:.{digits}f}{unit} ({CONFIDENCE:.0%} CI, {seeds} paired seeds)'
  if difference.beyond_noise:
    return f'{measured}: larger than the noise.'
  needed = f'about {difference.seeds_needed}' if difference.seeds_needed else f'more than {MOST_SEEDS:,}'
  return (
      f'{measured}: not distinguishable from the noise; at this spread {needed} seeds would be needed to see a '
      'difference of this size.'
  )


def _notes(
    by_arm: Mapping[str, Sequence[Result]], arms: Sequence[Arm], differences: Sequence[Difference], metric: str
) -> list[str]:
  """What stands in the way of a fair comparison, each in a sentence."""
  notes = []
  runs = [run for runs in by_arm.values() for run in runs]
  for run in runs:
    if not math.isfinite(run.number(metric)):
      notes.append(f'{run.arm} seed {run.seed} has no finite {metric} and is left out: the rest is what went well.')
  for arm in arms[1:]:
    if lonely := sorted(set(arm.seeds) ^ set(arms[0].seeds)):
      notes.append(f'{arm.name} and {arms[0].name} do not share seeds {lonely}: in the means, not in the difference.')
  for key, consequence in (
      ('tokens', 'the arms did not train equally long'), ('corpus', 'the arms did not read the same text'),
      ('device', 'tokens/s is not comparable'),
  ):
    if len(found := {str(run.values[key]) for run in runs if key in run.values}) > 1:
      notes.append(f'{key} differs between runs ({", ".join(sorted(found, key=_natural))}): {consequence}.')
  for arm in arms[1:]:
    notes.extend(_parameter_notes(arm, arms[0]))
  if len(differences) > 1:
    notes.append(f'{len(differences)} comparisons at {CONFIDENCE:.0%}: one such interval in twenty misses by chance.')
  return notes


def _parameter_notes(arm: Arm, first: Arm) -> list[str]:
  """Say it where arms differ by more than 1%, and where the router alone explains it."""
  def change(path: str) -> float:
    return arm.means[path] / first.means[path] - 1 if first.means[path] else math.nan

  notes = []
  if abs(change('params.total')) > 0.01:
    notes.append(f'{arm.name} has {change("params.total"):+.1%} total parameters: not an equal-size comparison.')
  if abs(change('params.active')) > 0.01:
    without = change('params.active_without_router')
    router = f', {without:+.1%} without its router' if math.isfinite(without) else ''
    notes.append(f'{arm.name} has {change("params.active"):+.1%} active parameters{router}.')
  return notes


def _facts(results: Sequence[Result]) -> str:
  """One line for what all runs share; what they do not share is in the notes."""
  def shared(key: str) -> Any:
    found = {json.dumps(result.values.get(key)) for result in results}
    return json.loads(found.pop()) if len(found) == 1 else None

  phrases = {'steps': '{:,} steps', 'tokens': '{:,} tokens a run', 'corpus': 'corpus {}', 'device': 'on {}'}
  return ', '.join(phrase.format(value) for key, phrase in phrases.items() if (value := shared(key)) is not None)


# --- printing ---------------------------------------------------------------------------------------------------------


def _number(value: float, style: str = '.4f') -> str:
  return '' if math.isnan(value) else format(value, style)


def _digits(difference: Difference) -> int:
  """Decimals that show two digits of the interval (or of the difference, if that is all there is), at least four."""
  scale = difference.half_width if difference.half_width > 0 else abs(difference.mean)
  return min(8, max(4, 1 - math.floor(math.log10(scale)))) if scale > 0 else 4


def _interval(difference: Difference) -> str:
  if math.isnan(difference.mean):
    return 'no common seed'
  digits = _digits(difference)
  noise = 'one seed' if math.isnan(difference.half_width) else f'± {difference.half_width:.{digits}f}'
  return f'{difference.mean:+.{digits}f} {noise}'


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
  kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
  return [[row[column] for column in kept] for row in rows]


def _padded(rows: list[list[str]]) -> list[list[str]]:
  """Names to the left, numbers to the right."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  return [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows]


def markdown_table(rows: list[list[str]]) -> str:
  """The first row is the head."""
  head, *body = _padded(rows)
  rule = [':' + '-' * (len(head[0]) - 1), *('-' * (len(cell) - 1) + ':' for cell in head[1:])]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, rule, *body))


def terminal_table(rows: list[list[str]]) -> str:
  """The first row is the head."""
  head, *body = ('  '.join(row) for row in _padded(rows))
  return '\n'.join([head, '─' * len(head), *body])


def _wrapped(lead: str, text: str) -> str:
  return textwrap.fill(text, COLUMNS, initial_indent=lead, subsequent_indent=' ' * len(lead), break_long_words=False)


def nan_to_none(content: Any) -> Any:
  """For strict JSON."""
  if isinstance(content, Mapping):
    return {key: nan_to_none(value) for key, value in content.items()}
  if isinstance(content, list | tuple):
    return [nan_to_none(value) for value in content]
  return None if isinstance(content, float) and not math.isfinite(content) else content


# --- drawing ----------------------------------------------------------------------------------------------------------


def figure(results: Sequence[Result]) -> bytes:
  """PNG: held-out loss over tokens (mean, range of the seeds), and each arm minus the first with its 95% interval."""
  from matplotlib.figure import Figure  # without pyplot: no global state and no display
  from matplotlib.ticker import EngFormatter

  curves: dict[str, dict[int, dict[int, float]]] = {}
  for result in results:
    curves.setdefault(result.arm, {})[result.seed] = result.curve()
  first = next(iter(curves))
  canvas = Figure(figsize=(11, 4.2) if len(curves) > 1 else (6, 4.2), dpi=150, layout='constrained')
  panels = canvas.subplots(1, 2 if len(curves) > 1 else 1, squeeze=False)[0]
  several = max(len(runs) for runs in curves.values()) > 1
  colour = {arm: COLOURS[index % len(COLOURS)] for index, arm in enumerate(curves)}
  dashes = ('-', '--', '-.', ':')  # so that equal curves stay visible
  style = {
      arm: {'color': colour[arm], 'linestyle': dashes[index % len(dashes)], 'marker': 'o', 'markersize': 3}
      for index, arm in enumerate(curves)
  }

  for arm, runs in curves.items():
    tokens, losses_ST = _aligned(list(runs.values()))
    label = f'{arm} ({len(runs)} seed{"s" if len(runs) > 1 else ""})'
    panels[0].plot(tokens, losses_ST.mean(axis=0), label=label, **style[arm])
    if len(runs) > 1:
      panels[0].fill_between(tokens, losses_ST.min(axis=0), losses_ST.max(axis=0), color=colour[arm], alpha=0.2, lw=0)
    if arm == first:
      continue
    common = sorted(runs.keys() & curves[first].keys())
    if not common:
      continue
    tokens, both_ST = _aligned([each[seed] for each in (runs, curves[first]) for seed in common])
    pairs_ST = both_ST[: len(common)] - both_ST[len(common) :]
    mean_T = pairs_ST.mean(axis=0)
    panels[1].plot(tokens, mean_T, label=f'{arm} − {first}', **style[arm])
    if len(common) > 1:
      half_T = t_half_width(pairs_ST.std(axis=0, ddof=1), len(common))
      panels[1].fill_between(tokens, mean_T - half_T, mean_T + half_T, color=colour[arm], alpha=0.2, lw=0)

  panels[0].set(title='Held-out loss ' + ('(mean and range of seeds)' if several else '(one seed)'))
  for panel in panels[1:]:
    panel.axhline(0, color='0.3', lw=1)
    panel.set(title='Paired difference ' + ('(mean, 95% interval)' if several else '(one seed: no interval)'))
  for panel in panels:
    panel.set(xlabel='tokens seen', ylabel='nats per token')
    panel.xaxis.set_major_formatter(EngFormatter(sep=''))
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
    if panel.lines:
      panel.legend(frameon=False)
  png = io.BytesIO()
  canvas.savefig(png, format='png')
  return png.getvalue()


def _aligned(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], np.ndarray]:
  """The token counts that all curves have, and their values there, [S, T]."""
  tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
  return tokens, np.array([[np.nan if curve[t] is None else curve[t] for t in tokens] for curve in curves], np.float64)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    root: str | os.PathLike, metric: str = 'heldout_loss', published: str = '', docs: str = '',
    arms: Sequence[str] | None = None,
) -> Summary:
  """Compare what has finished under `root`: summary.md, summary.json, loss_curves.png, TensorBoard run `summary`.

  Several may do so at once, as the jobs of a sweep when they end: each file is that of one of them, whole.

  Raises:
    ReportError: as `load_results` and `summarize`.
  """
  root = epath.Path(root)
  results = load_results(root, arms)
  summary, png = summarize(results, metric, published, docs), figure(results)
  write_whole(root / 'summary.md', summary.to_markdown() + '\n![loss curves](loss_curves.png)\n')
  write_whole(root / 'summary.json', summary.to_json())
  write_whole(root / 'loss_curves.png', png)
  writer = RunWriter(root / 'summary')
  writer.text('comparison', summary.to_markdown())
  writer.image(0, 'loss_curves', png)
  writer.close()
  return summary
