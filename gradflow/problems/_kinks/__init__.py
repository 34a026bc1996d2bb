"""Where the gradient of a problem jumps."""

from gradflow.problems._kinks._walk import kinks_of as kinks_of
