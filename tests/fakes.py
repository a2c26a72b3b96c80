"""Programs that are not here, played: each writes down its arguments and answers as a test says.

PATH is a folder of the fakes and of links to the few tools that the scripts use, so that no test reaches the real ones.
"""

import json
import os
import shutil
import signal
import sys

TOOLS = 'awk bash cat dirname env grep id kill mkdir mktemp nohup python3 realpath rm setsid sleep tail touch'.split()

PLAYER = f'''#!{sys.executable} -S
import fcntl, json, os, pathlib, signal, sys

folder = pathlib.Path(__file__).parent.parent
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder / 'calls.jsonl', 'a+') as calls:
  fcntl.flock(calls, fcntl.LOCK_EX)
  calls.write(json.dumps(words) + '\\n')
  play = json.loads((folder / 'play.json').read_text())
  key = next((key for key in play if key in ' '.join(words)), None)
  answers = play.get(key, [{{}}])
  answer = answers.pop(0) if len(answers) > 1 else answers[0]
  (folder / 'play.json').write_text(json.dumps(play))
for path, text in answer.get('write', {{}}).items():
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{{path.name}}.{{os.getpid()}}')
  partial.write_text(text)
  os.replace(partial, path)
sys.stderr.write(answer.get('err', ''))
sys.stdout.write(answer.get('out', '') and answer['out'] + '\\n')
sys.stdout.flush()
if 'sleep' in answer:
  signal.pause()
if 'signal' in answer:
  os.kill(os.getpid(), answer['signal'])
sys.exit(answer.get('status', 0))
'''


def heed_signals() -> None:
  """For `preexec_fn`: what runs the tests may ignore these, as nohup does, and a child would inherit that."""
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


class Fakes:
  """`programs` in <folder>/bin; `environment` has nothing else on its PATH but `TOOLS`."""

  def __init__(self, folder, programs):
    self.folder = folder
    self.bin = folder / 'bin'
    self.bin.mkdir(parents=True)
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))
    for program in programs:
      (self.bin / program).write_text(PLAYER)
      (self.bin / program).chmod(0o755)
    self.play({})
    kept = {name: os.environ[name] for name in ('HOME', 'USER', 'LANG') if name in os.environ}
    self.environment = kept | {'PATH': str(self.bin), 'TMPDIR': str(folder), 'POLL_SECONDS': '0'}

  def play(self, answers):
    """{part of a command line: its answers, one after the other}; the last one stays. Without one: exit code 0.

    An answer has any of out, err, status, write {path: text}, signal (of its own death) and sleep (until a signal).
    """
    (self.folder / 'play.json').write_text(json.dumps(answers))
    (self.folder / 'calls.jsonl').write_text('')

  def calls(self, program=None):
    """Command lines so far, as lists of words."""
    found = [json.loads(line) for line in (self.folder / 'calls.jsonl').read_text().splitlines()]
    return [words for words in found if program in (None, words[0])]
