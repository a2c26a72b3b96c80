"""How every command ends when a person can mend what went wrong: one line, `error: ...`, and exit code 1."""

import argparse
import contextlib
import sys

from mmx.config import ConfigError


class Parser(argparse.ArgumentParser):
  """argparse with its complaint on one line."""

  def error(self, message):
    stop(message)


def parser(module: str, description: str) -> Parser:
  """Of `python -m module`; the description keeps its lines."""
  lines = argparse.RawDescriptionHelpFormatter
  return Parser(prog=f'python -m {module}', description=description, formatter_class=lines)


@contextlib.contextmanager
def errors_in_one_line():
  """Ends the command for an error that is told to a person: of the configuration, the files, or raised by mmx itself.

  Any other exception is a defect and keeps its traceback.
  """
  try:
    yield
  except (ConfigError, OSError) as error:
    stop(error)
  except (RuntimeError, ValueError) as error:
    if type(error).__module__.startswith('mmx.'):  # CheckpointError, UnsupportedError, ...: one line says it all
      stop(error)
    raise


def stop(error):
  sys.exit(f'error: {error}')
