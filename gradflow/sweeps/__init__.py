"""Many runs at once: grids of members, batched, stored and resumed."""

from gradflow.sweeps._store import check_writable as check_writable
from gradflow.sweeps._store import open_store as open_store
from gradflow.sweeps._store import to_netcdf as to_netcdf
from gradflow.sweeps._store import write_dataset as write_dataset
from gradflow.sweeps._sweep import sweep as sweep
