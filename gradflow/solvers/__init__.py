"""Step-size control for flows, the default choice of method, and the diffrax solvers that suit.

Any solver of diffrax can be given to `gradflow.solve`. A method that diffrax cannot express, since it remembers steps,
chooses its stages or solves its own equations, is one file here with a subclass of `AbstractMethod`, which makes one
attempted step: `begin`, `attempt`, `interpolate`; one line below and one row in `tests/surface.py`.

>>> import diffrax, jax.numpy as jnp, gradflow as gf
>>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
>>> sol = gf.solve(flow, jnp.ones(1), [1.0], solver=diffrax.Heun())
>>> round(float(sol.final[0]), 3)
0.368
"""

from diffrax import Bosh3 as Bosh3
from diffrax import Dopri5 as Dopri5
from diffrax import Dopri8 as Dopri8
from diffrax import Heun as Heun
from diffrax import Kvaerno3 as Kvaerno3
from diffrax import Kvaerno5 as Kvaerno5
from diffrax import Tsit5 as Tsit5

from gradflow.solvers._automatic import Automatic as Automatic
from gradflow.solvers._catching_up import CatchingUp as CatchingUp
from gradflow.solvers._control import StepControl as StepControl
from gradflow.solvers._cost import evaluations_per_step as evaluations_per_step
from gradflow.solvers._default import default_solver as default_solver
from gradflow.solvers._euler_maruyama import AbstractStochasticMethod as AbstractStochasticMethod
from gradflow.solvers._euler_maruyama import EulerMaruyama as EulerMaruyama
from gradflow.solvers._euler_maruyama import FixedSteps as FixedSteps
from gradflow.solvers._euler_maruyama import SmallNoise as SmallNoise
from gradflow.solvers._hybrid import Hybrid as Hybrid
from gradflow.solvers._method import AbstractMethod as AbstractMethod
from gradflow.solvers._method import Attempt as Attempt
from gradflow.solvers._method import Field as Field
from gradflow.solvers._ndf import NDF as NDF
from gradflow.solvers._nystrom import Nystrom as Nystrom
from gradflow.solvers._one_step import OneStep as OneStep
from gradflow.solvers._rkc2 import RKC2 as RKC2
from gradflow.solvers._rock2 import ROCK2 as ROCK2
from gradflow.solvers._sk_rock import SKROCK as SKROCK
from gradflow.solvers._stabilised import AbstractStabilised as AbstractStabilised
