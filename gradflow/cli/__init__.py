"""The command line: reads its words, calls a study, prints what it found."""

from gradflow.cli._main import main as main
