"""Results on disk: solutions as files of pytrees, labelled data sets as zarr groups, netCDF.

What opens, writes and exports data sets is public as `gf.sweeps.open_store` and the like. It needs xarray and zarr,
which importing the package does not wait for, so that it is imported from its own files.
"""

from gradflow.stores._pytree_file import read_pytree as read_pytree
from gradflow.stores._pytree_file import write_pytree as write_pytree
