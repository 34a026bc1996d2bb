"""Many runs at once: grids of members, batched, stored and resumed."""

from gradflow.stores._netcdf import to_netcdf as to_netcdf
from gradflow.stores._zarr_group import check_writable as check_writable
from gradflow.stores._zarr_group import open_store as open_store
from gradflow.stores._zarr_group import write_dataset as write_dataset
from gradflow.sweeps._callback import SweepSnapshot as SweepSnapshot
from gradflow.sweeps._sweep import sweep as sweep
