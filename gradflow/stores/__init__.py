"""Results on disk."""

from gradflow.stores._pytree_file import read_pytree as read_pytree
from gradflow.stores._pytree_file import write_pytree as write_pytree
