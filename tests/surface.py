"""Calls of everything public, at toy size: the table that the tests of settings and tools of JAX run through.

Each entry takes the floating-point type of the parameters, and returns what it computed. Extend it with what is new.
"""

import contextlib
import functools
import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradflow as gf
from gradflow.models.nodes import GaussLegendre, Sobol, Uniform

TS = [0.0, 0.5, 1.0]
KEY = jax.random.key


def model(dtype, **options):
    return gf.models.TwoLayer(2, 3, **({"activation": jnp.tanh, "dtype": dtype, "key": KEY(0)} | options))


def data(dtype, labels=(1.0, -1.0, 0.5)):
    x = np.array([[1.0, 0.0], [-0.5, 1.0], [0.3, -1.0]], dtype)
    return x, np.array(labels, dtype)


def problem(dtype, loss=gf.losses.square, **options):
    labels = (1.0, -1.0, 0.5) if loss is gf.losses.square else (1.0, -1.0, 1.0)
    return gf.EmpiricalRisk(*data(dtype, labels), loss, **options)


def quadratic(w):
    return 0.5 * jnp.sum(jnp.asarray([1.0, 50.0], w.dtype) * w**2)


def smoothed(dtype, smoothing=0.05):
    return problem(dtype, predict=gf.models.Smoothed(smoothing))


def flow_on(build, dtype, **options):
    return gf.solve(build(problem(dtype)), model(dtype), TS, rtol=1e-3, **options)


def after_a_warm_up(dtype):
    flow = gf.MomentumDescentAscentFlow(problem(dtype), 0.1, 0.5, warm_up=5)
    with far_below_the_edge():
        return gf.solve(flow, model(dtype), [1.0, 2.0], rtol=1e-3)


@contextlib.contextmanager
def far_below_the_edge():
    """The amplitude falls so far there that in single precision a run says what rounding has left of its growth."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The amplitude has been so small")
        yield


def alternating(build, dtype):
    with far_below_the_edge():
        return flow_on(build, dtype)


def flows(dtype):
    """Name -> run of each flow."""
    gradient = functools.partial(flow_on, dtype=dtype)
    ones = jnp.ones(2, dtype)
    diagonal = gf.EmpiricalRisk(np.eye(2, dtype=dtype), np.array([1.0, -2.0], dtype), gf.losses.square, reduction="sum")
    relu = model(dtype, activation=jax.nn.relu)
    teaching = gf.TeacherStudent.orthogonal(20, 2, noise=0.1, dtype=dtype)

    def overlaps(informed=True):
        draw = teaching.informed if informed else teaching.uninformed
        return teaching.order_parameters(draw(2, KEY(0)))

    def fluctuations():
        mean = gf.OrderParameterFlow(teaching, gamma_over_p=0.5, allow_float32=True)
        flow = gf.flows.FluctuationFlow(mean, 2, dim=20, samples=32, key=KEY(0))
        return gf.solve(flow, flow.start(overlaps()), TS, rtol=1e-3)

    def linearised():
        flow = gf.LinearisedFlow(problem(dtype), model(dtype))
        return gf.solve(flow, flow.start, TS, rtol=1e-3), flow.exact([1.0])

    def reduced():
        square = gf.TeacherStudent.orthogonal(20, 1, activation="square", dtype=dtype)
        flow = gf.flows.OverparametrisedFlow(square, allow_float32=True)
        start = square.order_parameters(square.uninformed(5, KEY(0)))
        return gf.solve(flow, flow.reduce(start), TS, rtol=1e-3)

    def mean_field():
        net, weights = averaging(dtype).draw(4, KEY(0))
        return gf.solve(gf.MeanFieldFlow(problem(dtype), weights), net, TS, rtol=1e-3)

    def central():
        averages = {"mean": gf.observables.IterateMean(problem(dtype)), "variance": gf.observables.Variance()}
        flow = gf.CentralFlow(gf.RMSProp(problem(dtype), 0.01, initial_scale=0.1), directions=2)
        return gf.solve(flow, model(dtype), [0.0, 0.02], rtol=1e-3, observe=averages)

    def stochastic(order, solver=None):
        flow = gf.SGDFlow(problem(dtype), 0.1, batch_size=2, order=order)
        return gf.solve(flow, model(dtype), TS, solver=solver, key=KEY(0))

    schedule = gf.flows.InterpolatedSchedule([0.0, 1.0], [0.5, 0.2])
    return {
        "GradientFlow": lambda: gradient(gf.GradientFlow),
        "GradientFlow, ReLU": lambda: gf.solve(gf.GradientFlow(problem(dtype)), relu, TS, rtol=1e-3),
        "HeavyBallFlow": lambda: gradient(lambda p: gf.HeavyBallFlow(p, 1.0, 0.01)),
        "NesterovFlow": lambda: gradient(lambda p: gf.NesterovFlow(p, 1.0, 0.01)),
        "NesterovConvexFlow": lambda: gf.solve(
            gf.NesterovConvexFlow(problem(dtype), 0.01), model(dtype), [0.5, 1.0], rtol=1e-3
        ),
        "MomentumFlow": lambda: gradient(lambda p: gf.MomentumFlow(p, 0.01, 0.9)),
        "SecondOrderFlow": lambda: gradient(lambda p: gf.SecondOrderFlow(p, 1.0)),
        "ModifiedFlow": lambda: gradient(lambda p: gf.ModifiedFlow(p, 0.1)),
        "MomentumDescentAscentFlow": lambda: after_a_warm_up(dtype),
        "PrincipalFlow": lambda: gradient(lambda p: gf.PrincipalFlow(p, 0.1)),
        "DescentAscentFlow": lambda: alternating(lambda p: gf.DescentAscentFlow(p, 0.1), dtype),
        "EdgeFlow": lambda: alternating(lambda p: gf.EdgeFlow(p, 0.1), dtype),
        "RodFlow": lambda: alternating(lambda p: gf.RodFlow(p, 0.1), dtype),
        "LinearisedFlow": linearised,
        "LogDiagonalFlow": lambda: gf.solve(
            gf.LogDiagonalFlow(diagonal), gf.models.LogDiagonal(2, log_scale=-9.0, dtype=dtype), TS, rtol=1e-3
        ),
        "PolarFlow": lambda: gf.solve(
            gf.PolarFlow(problem(dtype)), gf.Polar(relu, -9.0), TS, rtol=1e-3, solver=gf.solvers.Tsit5()
        ),
        "NeuronPolarFlow": lambda: gf.solve(
            gf.NeuronPolarFlow(problem(dtype)), gf.Polar(relu, np.full(3, -9.0)), TS, rtol=1e-3
        ),
        "OrderParameterFlow": lambda: gf.solve(
            gf.OrderParameterFlow(teaching, gamma_over_p=0.5, allow_float32=True), overlaps(), TS, rtol=1e-3
        ),
        "OrderParameterFlow, schedule": lambda: gf.solve(
            gf.OrderParameterFlow(teaching, gamma_over_p=0.5, schedule=schedule, allow_float32=True),
            overlaps(),
            TS,
            rtol=1e-3,
        ),
        "OrderParameterFlow, tanh": lambda: gf.solve(
            gf.OrderParameterFlow(np.eye(2, dtype=dtype), jnp.tanh, gamma_over_p=0.5, allow_float32=True),
            overlaps(),
            TS,
            rtol=1e-3,
        ),
        "FluctuationFlow": fluctuations,
        "OverparametrisedFlow": reduced,
        "MeanFieldFlow": mean_field,
        "CentralFlow": central,
        "SGDFlow": lambda: stochastic(1),
        "SGDFlow, order 2": lambda: stochastic(2),
        "SKROCK": lambda: stochastic(1, gf.solvers.SKROCK(0.5, stages=3)),
        "FixedSteps": lambda: stochastic(1, gf.solvers.FixedSteps(diffrax.Euler(), 0.1)),
        "until": lambda: gf.solve(
            gf.GradientFlow(quadratic), ones, [0.5, 1e3], until=gf.Until(quadratic, below=0.1), rtol=1e-3
        ),
        "a start of exactly zero": lambda: gf.solve(
            gf.GradientFlow(lambda w: jnp.sum((w - 1) ** 2)), jnp.zeros(2, dtype), TS, rtol=1e-3
        ),
        "loss that vanishes": lambda: gf.solve(
            gf.GradientFlow(lambda w: 0.0 * jnp.sum(w)), jnp.ones(2, dtype), TS, rtol=1e-3
        ),
    }


def averaging(dtype):
    laws = {"first": Uniform(-1, 1), "middle": [Uniform(0, 1)], "output": Uniform(-1, 1)}
    return gf.models.MeanFieldStart(2, **laws, dtype=dtype)


SOLVERS = ["Automatic", "NDF", "Nystrom", "Hybrid", "ROCK2", "RKC2", "Tsit5", "Heun", "Bosh3", "Dopri5", "Kvaerno3"]


def solvers(dtype):
    """Name -> run of each method, on the stiff side of its range."""

    def run(name, solver):
        flow = gf.HeavyBallFlow(quadratic, 0.1, 1.0) if name == "Nystrom" else gf.GradientFlow(quadratic)
        return gf.solve(flow, jnp.ones(2, dtype), [0.3, 1.0], solver=solver(), rtol=1e-2)

    return {name: functools.partial(run, name, getattr(gf.solvers, name)) for name in SOLVERS}


def rules(dtype):
    """Name -> run of each rule."""

    def run(build):
        return gf.iterate(build(problem(dtype)), model(dtype), 4, save_every=2)

    def mean_field():
        net, weights = averaging(dtype).draw(4, KEY(0))
        return gf.iterate(gf.MeanFieldSGD(problem(dtype), weights, key=KEY(0)), net, 3)

    def one_pass():
        teaching = gf.TeacherStudent.orthogonal(20, 2, noise=0.1, dtype=dtype)
        return gf.iterate(gf.OnePassSGD(teaching, 0.5, key=KEY(0)), teaching.informed(2, KEY(0)), 3)

    return {
        "GradientDescent": lambda: run(lambda p: gf.GradientDescent(p, 0.1)),
        "HeavyBall": lambda: run(lambda p: gf.HeavyBall(p, 0.1, momentum=0.5)),
        "Nesterov": lambda: run(lambda p: gf.Nesterov(p, 0.1)),
        "SGD": lambda: run(lambda p: gf.SGD(p, 0.1, batch_size=2, key=KEY(0))),
        "SGD, epochs": lambda: run(lambda p: gf.SGD(p, 0.1, batch_size=1, key=KEY(0), sampling="epochs")),
        "OptaxRule": lambda: run(lambda p: gf.OptaxRule(p, optax.adam, 0.1)),
        "RMSProp": lambda: run(lambda p: gf.RMSProp(p, 0.1)),
        "ScalarRMSProp": lambda: run(lambda p: gf.ScalarRMSProp(p, 0.1)),
        "MeanFieldSGD": mean_field,
        "OnePassSGD": one_pass,
    }


def observables(dtype):
    """Name -> value of each observable; those of a state are looked at along runs."""
    o, p, relu = gf.observables, problem(dtype), model(dtype, activation=jax.nn.relu)
    signs = problem(dtype, gf.losses.logistic)
    diagonal = gf.EmpiricalRisk(*data(dtype), gf.losses.square)
    log_diagonal = gf.models.LogDiagonal(2, log_scale=-2.0, dtype=dtype)
    narrow = gf.models.MeanFieldStart(2, first=Uniform(-1, 1), output=Uniform(-1, 1), dtype=dtype)
    plus_minus = np.array([1.0, -1.0], dtype)
    apart = gf.EmpiricalRisk(np.eye(2, dtype=dtype), plus_minus, gf.losses.logistic, lambda w, x: x @ w)
    computed = {
        "Loss": lambda: o.Loss(p)(relu),
        "Accuracy": lambda: o.Accuracy(signs)(relu),
        "GradientNorm": lambda: o.GradientNorm(p)(relu),
        "GradientBound": lambda: o.GradientBound(problem(dtype, gf.losses.exponential))(relu),
        "ParameterNorm": lambda: o.ParameterNorm()(relu),
        "Margins": lambda: o.Margins(signs)(relu),
        "NormalisedMargin": lambda: o.NormalisedMargin(signs)(relu),
        "MaxMarginResidual": lambda: o.MaxMarginResidual(apart)(jnp.array([3.0, -3.0], dtype)),
        "NeuronPartition": lambda: o.NeuronPartition(signs.x, signs.y)(relu),
        "PartitionCounts": lambda: o.PartitionCounts(signs.x, signs.y)(relu),
        "NeuronMovement": lambda: o.NeuronMovement(relu)(model(dtype, key=KEY(1))),
        "NeuronNorms": lambda: o.NeuronNorms()(relu),
        "NeuronAngles": lambda: o.NeuronAngles(jnp.ones(2, dtype))(relu),
        "HessianEigenvalues": lambda: o.HessianEigenvalues(p, 2)(model(dtype)),
        "Sharpness": lambda: o.Sharpness(p)(model(dtype)),
        "HessianEigenpairs": lambda: o.HessianEigenpairs(p, 2, vectors=True)(model(dtype)),
        "NTK": lambda: o.NTK(p)(relu),
        "NTKEigenvalues": lambda: o.NTKEigenvalues(p)(relu),
        "Balancedness": lambda: o.Balancedness()(relu),
        "ActivationPattern": lambda: o.ActivationPattern(p.x)(relu),
        "SlidingNeurons": lambda: o.SlidingNeurons(p, 0.01)(relu),
        "Aligned": lambda: o.Aligned(p)(relu),
        "Correlation": lambda: o.Correlation(p)(relu),
        "KKTResidual": lambda: o.KKTResidual(p)(relu),
        "LogNorm": lambda: o.LogNorm()(relu),
        "LossRate": lambda: o.LossRate(diagonal, scale=2.5)(log_diagonal),
        "ParticleHistogram": lambda: o.ParticleHistogram([0.0, 0.5, 1.0])(
            gf.models.MeanFieldNet((jnp.array([[0.1], [0.4], [0.6], [2.0]], dtype),), jnp.ones(4, dtype))
        ),
        "wasserstein": lambda: o.wasserstein(*(jnp.array(v, dtype) for v in ([0, 1], [0.5, 0.5], [2, 3], [0.5, 0.5]))),
        "particle_distance": lambda: o.particle_distance(narrow.draw(4, KEY(0)), narrow.draw(4, KEY(1))),
        "switches": lambda: o.switches([0.0, 1.0], np.array([[[3]], [[2]]])),
        "survivors": lambda: o.survivors(np.array([[[3, 3, 2]], [[3, 2, 3]]])),
    }
    along = {}
    along["Lyapunov"] = lambda: gf.solve(
        gf.NesterovFlow(quadratic, 1.0, 0.01),
        jnp.ones(2, dtype),
        TS,
        observe={"energy": o.Lyapunov(jnp.zeros(2, dtype), least=0.0)},
        rtol=1e-3,
    )
    observed = {"norms": o.NeuronNorms(), "pattern": o.ActivationPattern(p.x), "sharpness": o.Sharpness(p, rtol=1e-8)}
    along["observed along a run"] = lambda: flow_on(gf.GradientFlow, dtype, observe=observed)
    return computed | along


def models(dtype):
    """Name -> value of each model, problem and loss at some point."""
    x, y = map(jnp.asarray, data(dtype))
    m, key = gf.models, KEY(0)
    losses = {
        "square": y, "logistic": np.sign(y), "exponential": np.sign(y), "hinge": np.sign(y)
    }  # fmt: skip

    def averaged():
        net, weights = averaging(dtype).nodes(GaussLegendre(2))
        return gf.PopulationRisk(x, y, np.full(3, 1 / 3, dtype), gf.losses.square)(net), weights

    def overlaps(activation):
        teaching = gf.TeacherStudent.orthogonal(20, 2, activation=activation, noise=0.1, dtype=dtype)
        student = teaching.informed(3, key)
        flow = gf.OrderParameterFlow(teaching, gamma_over_p=0.5, allow_float32=True)
        return teaching(student), flow.risk(teaching.order_parameters(student))

    def built(build, **options):
        return lambda: build(2, **options, dtype=dtype, key=key)(x[0])

    computed = {
        "TwoLayer": built(m.TwoLayer, width=3),
        "TwoLayer, balanced": built(m.TwoLayer, width=3, balanced=True, law=m.laws.sphere),
        "MLP": built(m.MLP, width=3),
        "MLP, mup": built(m.MLP, width=3, out_size=2, depth=2, parametrisation="mup"),
        "ConvNet": lambda: m.ConvNet((4, 4), (2,), 3, dtype=dtype, key=key)(jnp.ones(16, dtype)),
        "DeepLinear": built(m.DeepLinear, width=3),
        "OneLayer": built(m.OneLayer, width=3),
        "SignedTwoLayer": built(m.SignedTwoLayer, width=3),
        "mildly_parametrised": built(m.mildly_parametrised, width=4),
        "DiagonalLinear": built(m.DiagonalLinear, law=m.laws.uniform),
        "LogDiagonal": lambda: m.LogDiagonal(2, log_scale=-2.0, dtype=dtype)(x[0]),
        "MeanFieldNet": lambda: m.MeanFieldNet((jnp.ones((4, 2), dtype),), jnp.ones(4, dtype))(x[0]),
        "RadialActivation": lambda: m.RadialActivation(jnp.cos, dim=3)(jnp.array(2.0, dtype)),
        "squared_relu": lambda: m.squared_relu(x[0]),
        "Smoothed": lambda: m.Smoothed(0.01)(model(dtype, activation=jax.nn.relu), x),
        "as_nodes": lambda: m.as_nodes(model(dtype, parametrisation="mup")),
        "Polar": lambda: gf.Polar(model(dtype), -2.0).ordinary(),
        "EmpiricalRisk": lambda: jax.value_and_grad(problem(dtype, reduction="sum"))(model(dtype)),
        "PopulationRisk": averaged,
        "NeuralCorrelation": lambda: gf.NeuralCorrelation(problem(dtype))(model(dtype, activation=jax.nn.relu)),
        "cross_entropy": lambda: gf.EmpiricalRisk(x, np.array([0, 1, 1]), gf.losses.cross_entropy)(
            model(dtype, out_size=2)
        ),
    }
    for name, labels in losses.items():
        computed[f"losses.{name}"] = lambda name=name, labels=labels: jax.value_and_grad(
            gf.EmpiricalRisk(x, labels, getattr(gf.losses, name), predict=lambda w, x: x @ w)
        )(jnp.ones(2, dtype))
    for activation in ("erf", "relu", "square"):
        computed[f"TeacherStudent, {activation}"] = functools.partial(overlaps, activation)
    return computed


def limits(dtype):
    """Name -> what is made of several runs."""
    diagonal = gf.EmpiricalRisk(np.eye(2, dtype=dtype), np.array([1.0, -2.0], dtype), gf.losses.square, reduction="sum")
    linear = functools.partial(model, dtype, activation=jax.nn.identity)
    narrow = gf.models.MeanFieldStart(1, first=Uniform(-1, 1), output=Uniform(-1, 1), dtype=dtype)
    one = gf.EmpiricalRisk(np.ones((1, 1), dtype), np.ones(1, dtype), gf.losses.square)

    def saddles():
        start = gf.models.LogDiagonal(2, log_scale=-9.0, dtype=dtype)
        sol = gf.solve(gf.LogDiagonalFlow(diagonal), start, np.linspace(0, 30, 61), rtol=1e-3)
        return gf.find_saddles(sol, diagonal)

    return {
        "first_escape": lambda: gf.first_escape(diagonal, gf.Polar(linear(), -50.0), rtol=1e-4),
        "alternating_flow": lambda: gf.alternating_flow(
            diagonal, gf.models.DiagonalLinear(2, dtype=dtype), log_norms=-100.0, rtol=1e-4, tolerance=1e-3
        ),
        "neuron_pursuit": lambda: gf.neuron_pursuit(
            diagonal, gf.models.TwoLayer(2, 1, dtype=dtype, key=KEY(0)), rounds=2, starts=4, rtol=1e-4, tolerance=1e-3
        ),
        "filippov": lambda: gf.filippov(
            lambda smoothing: gf.GradientFlow(smoothed(dtype, smoothing)),
            model(dtype, activation=jax.nn.relu),
            TS,
            rtol=1e-3,
        ),
        "find_saddles": saddles,
        "infinite_width": lambda: gf.infinite_width(one, narrow, TS, accuracy=1e-2),
        "infinite_width, Sobol": lambda: gf.infinite_width(one, narrow, TS, accuracy=0.1, rule=Sobol(16)),
        "width_fluctuations": lambda: gf.width_fluctuations(one, narrow, TS, rule=GaussLegendre(3), rtol=1e-3),
    }


def sweeps(dtype):
    """Name -> data sets of many runs."""

    def run(build, **options):
        axes = {"scale": np.array([0.5, 1.0]), "width": [2, 3]}
        return gf.sweep(build, axes, TS, progress=False, rtol=1e-3, **options)

    def net(scale, width):
        return gf.models.TwoLayer(2, width, activation=jnp.tanh, init_scale=scale, dtype=dtype, key=KEY(0))

    def compared():
        rule = gf.GradientDescent(quadratic, 0.01)
        return gf.compare(rule, jnp.ones(2, dtype), [0.02, 0.01], 0.2, rtol=1e-4)

    observe = {"norm": gf.observables.ParameterNorm(), "neurons": gf.observables.NeuronNorms()}
    return {
        "sweep": lambda: run(
            lambda scale, width: (gf.GradientFlow(problem(dtype)), net(scale, width)), observe=observe, save_params=True
        ),
        "sweep of a rule": lambda: run(
            lambda scale, width: (gf.GradientDescent(problem(dtype), 0.25), net(scale, width)), observe=observe
        ),
        "compare": compared,
    }


def theory(dtype):
    """Name -> predictions."""
    t, eye = gf.theory, np.eye(2, dtype=dtype)
    diagonal = gf.EmpiricalRisk(eye, np.array([3.0, -1.0], dtype), gf.losses.square, reduction="sum")
    widths = np.array([8, 16, 32])
    drawn = 2 + 3 / widths[:, None, None] + np.random.default_rng(0).normal(size=(3, 20, 1)) * 0.01
    return {
        "diagonal_saddles": lambda: t.diagonal_saddles(eye, np.array([1.0, -2.0], dtype), reduction="sum"),
        "linear_saddles": lambda: t.linear_saddles(eye, np.diag([4.0, 2.0]).astype(dtype), reduction="sum"),
        "escape": lambda: t.escape(0.5, -2302.6, curvature=0.0),
        "kkt_points": lambda: t.kkt_points(
            gf.NeuralCorrelation(diagonal), gf.models.TwoLayer(2, 1, dtype=dtype, key=KEY(0)), starts=8, iterations=60
        ),
        "saxe_mode": lambda: t.saxe_mode(2.0, s=1.0, start=1e-2),
        "momentum_rates": lambda: t.momentum_rates([1.0, 4.0], 0.25, 0.01, "heavy_ball"),
        "faster_method": lambda: t.faster_method([1.0, 10.0], mu=0.5, s=0.05),
        "effective_mu": lambda: t.effective_mu(0.9, 0.01),
        "stability_threshold": lambda: t.stability_threshold(gf.RMSProp(problem(dtype), 0.1)),
        "stable_step": lambda: t.stable_step(2.0, 1.0, "heavy_ball"),
        "partition_condition": lambda: t.partition_condition(*data(dtype, (1.0, -1.0, 1.0))),
        "phase_region": lambda: t.phase_region(0.3, 0.2),
        "plateau": lambda: t.plateau(1.0, 1e-3),
        "finite_dim_plateau": lambda: t.finite_dim_plateau(0.5, 1e6, 1e-3),
        "relu_escape": lambda: t.relu_escape(np.eye(2), np.array([1.0, 1.0]), iterations=20),
        "relu_gram": lambda: t.relu_gram(eye),
        "two_directions": lambda: t.two_directions(ratio=3.0, angle=0.1, share=0.375),
        "extrapolate_width": lambda: t.extrapolate_width(widths, drawn),
        "width_limit": lambda: t.width_limit("mup", 1),
    }


def generators(dtype):
    """Name -> data."""
    d = gf.data
    return {
        "circle": lambda: d.circle(4, dtype=dtype),
        "correlated": lambda: d.correlated(4, 3, dtype=dtype),
        "digits": lambda: d.digits(n=4, labels="onehot", dtype=dtype),
        "mnist_subset": lambda: d.mnist_subset(n=4, centre=True, unit_norm=True, dtype=dtype),
        "gaussian_teacher": lambda: d.gaussian_teacher(4, 3, 2, noise=0.1, dtype=dtype),
        "linear_regression": lambda: d.linear_regression(4, 3, noise=0.1, dtype=dtype),
        "orthogonal_inputs": lambda: d.orthogonal_inputs(3, 4, dtype=dtype),
        "two_directions": lambda: d.two_directions(dtype=dtype),
        "xor": lambda: d.xor(4, dtype=dtype),
        "load": lambda: d.load("digits", n=4, dtype=dtype),
    }


ROOMS = (flows, solvers, rules, observables, models, limits, sweeps, theory, generators)


def names():
    """Room and name of every entry."""
    return [(room.__name__, name) for room in ROOMS for name in room(np.dtype("float64"))]


def call(room, name, dtype):
    """The result of an entry."""
    return globals()[room](np.dtype(dtype))[name]()
