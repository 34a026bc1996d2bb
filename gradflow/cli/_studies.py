"""The commands that run a study, write its store and draw its figure."""

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from gradflow._checks import fail
from gradflow._solution import Status
from gradflow.cli._app import app
from gradflow.cli._process import configure_jax

if TYPE_CHECKING:
    import xarray as xr  # which takes long to import

Quick = Annotated[bool, typer.Option("--quick", help="A small version that takes about 20 seconds.")]
Out = Annotated[pathlib.Path, typer.Option("--out", help="Folder for the zarr store and the figure.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming what the store already holds.")]
Data = Annotated[str, typer.Option("--data", help="Data set; `gradflow info` lists the names.")]
Path = Annotated[
    str | None, typer.Option("--path", help="Folder with the files of the data set, instead of a download.")
]
Samples = Annotated[
    int | None, typer.Option("--samples", help="Number of samples; at most 500, or about 100 with --quick.")
]
Chunk = Annotated[
    str | None,
    typer.Option("--chunk", help="k/n: run only part k (from 1) of n, beside jobs with the same --out."),
]


@contextlib.contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Says what an interruption leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ngradflow: interrupted; what was finished is kept, and `{command}` goes on with it.", file=sys.stderr)
        sys.exit(130)


@app.command("small-init", short_help="Escape of ReLU networks from small weights: the main job.")
def small_init(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Samples = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes.")] = (0, 1),
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    rtol: Annotated[
        float | None, typer.Option("--rtol", help="Relative tolerance of a step; 1e-4, or 1e-3 with --quick.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; 3, or 1 with --quick.")] = None,
    chunk: Chunk = None,
) -> None:
    """Escape of two-layer ReLU networks from small initial weights: the main job.

    Gradient flow for square and logistic loss over scales 1e-1 ... 1e-6, widths and seeds; escape times, directions of
    the neurons and saddles beside predictions of theory, the cost of the flow and of gradient descent as accurate.
    Scales that no float holds, and other data sets, are those of `gradflow vanishing-init`.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _small_init as preset
    from gradflow.sweeps import check_writable

    dataset = preset.load_data(data, path=path, samples=samples, classes=classes, quick=quick)
    size = _given(preset.QUICK if quick else {}, rtol=rtol, seeds=None if seeds is None else range(seeds))
    name = "small-init-quick" if quick else "small-init"
    store = out / f"{name}.zarr"
    check_writable("out", store)
    part = _chunk(chunk)
    _say_what_is_there(store, fresh)
    with _resumable(_again()):
        ds = studies.small_init(dataset, **size, store=store, resume=not fresh, chunk=part)
    missing = int((ds.status < 0).sum())
    if missing:
        print(f"store: {store}: {ds.status.size - missing} of {ds.status.size} runs, the others are for other chunks")
        return
    _report(ds, store, out / f"{name}.png")
    _end_with(ds.status)


@app.command("compare", short_help="Gradient descent or momentum against its flows.")
def compare(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Samples = None,
    rule: Annotated[
        str, typer.Option("--rule", help="gradient_descent, heavy_ball or nesterov; momentum is 0.9.")
    ] = "gradient_descent",
    width: Annotated[int, typer.Option("--width", help="Width of the hidden layers.")] = 64,
    depth: Annotated[int, typer.Option("--depth", help="Number of hidden layers.")] = 2,
    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Flow time to compare on; 50, or 10 with --quick and descent.")
    ] = None,
    out: Out = pathlib.Path("gradflow-out"),
) -> None:
    """A discrete rule against its flows: the gap over learning rates, its order, and what accuracy costs."""
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _discrete_gap as preset
    from gradflow.sweeps import check_writable, write_dataset

    dataset = preset.load_data(data, path=path, samples=samples, quick=quick)
    rule = rule.replace("-", "_")
    name = "compare" + ("" if rule == "gradient_descent" else f"-{rule}") + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    few = preset.quick(rule) if quick else {"width": width, "depth": depth}
    size = _given(few, width=min(width, few["width"]), horizon=horizon)
    ds = studies.discrete_gap(dataset, rule=rule, **size)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


@app.command("mean-field", short_help="Networks of growing width beside width infinity.")
def mean_field(
    quick: Quick = False,
    data: Annotated[
        str, typer.Option("--data", help="`sine`, a regression in one dimension, or a name: two components of it.")
    ] = "sine",
    path: Path = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Number of samples; 20, 100 of a data set.")] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes.")] = (0, 1),
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Seeds of the widest; 16, or 8 with --quick.")] = None,
) -> None:
    """Infinite width as one more width: networks of 8 ... 1024 nodes, and SGD, beside their limit.

    Deviation and bias by width and depth beside what theory predicts, rules of nodes, test particles.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _mean_field as preset
    from gradflow.sweeps import check_writable, write_dataset

    name = f"mean-field-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    dataset = preset.load_data(data, path=path, samples=samples, classes=classes)
    size = _given(preset.QUICK if quick else {}, seeds=seeds)
    with _resumable(_again()):
        ds = studies.mean_field(dataset, **size, store=out / f"{name}-runs.zarr", resume=not fresh)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


@app.command("momentum", short_help="Heavy ball and Nesterov: flows, rates, which is faster.")
def momentum(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Number of samples; 40, or 24 with --quick.")] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes.")] = (0, 1),
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the methods; by default enough to converge.")
    ] = None,
    out: Out = pathlib.Path("gradflow-out"),
) -> None:
    """Heavy ball and Nesterov on wide ReLU networks: flows, rates per mode, which is faster, movement of neurons."""
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _momentum as preset
    from gradflow.sweeps import check_writable, write_dataset

    dataset = preset.load_data(data, path=path, samples=samples, classes=classes, quick=quick)
    name = f"momentum-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    size = _given(preset.QUICK if quick else {}, steps=steps)
    ds = studies.momentum(dataset, **size)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


@app.command("edge", short_help="Which flow is my optimiser, at the edge of stability?")
def edge(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Number of samples; 150, or 30 with --quick.")
    ] = None,
    activation: Annotated[str, typer.Option("--activation", help="tanh, gelu or relu.")] = "tanh",
    momentum: Annotated[float, typer.Option("--momentum", help="Of heavy ball and Nesterov's method.")] = 0.5,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the rules; 400, or 80 with --quick.")] = None,
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; 3, or 1 with --quick.")] = None,
) -> None:
    """Rules at the step sizes people use, beside every flow that is known for them.

    Gradient descent, heavy ball, Nesterov, RMSProp: distance to the flows, mean loss, sharpness, cost, and where each
    flow stops being valid, and why. With --quick, gradient descent alone.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _edge as preset
    from gradflow.sweeps import check_writable, write_dataset

    dataset = preset.load_data(data, path=path, samples=samples, quick=quick)
    name = f"edge-{data}" + ("" if activation == "tanh" else f"-{activation}") + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    size = _given(preset.QUICK if quick else {}, steps=steps, seeds=None if seeds is None else range(seeds))
    size |= {"activation": activation, "momentum": momentum, "resume": not fresh}
    with _resumable(_again()):
        ds = studies.edge(dataset, **size, store=out / f"{name}-runs")
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


@app.command("phase-diagram", short_help="One-pass SGD in high dimension beside its equations.")
def phase_diagram(
    quick: Quick = False,
    units: Annotated[int | None, typer.Option("--units", help="Teacher units; 4, or 2 with --quick.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Student units; 8, or 4 with --quick.")] = None,
    noise: Annotated[float, typer.Option("--noise", help="Variance of the label noise beside SGD.")] = 1e-3,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of SGD; 4, or 2 with --quick.")] = None,
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
) -> None:
    """One-pass SGD in high dimension: its regions against the order-parameter equations, and a map of them.

    Runs of SGD and the full system in every region, plateaus over noise and dimension, uninformed starts, what a
    learning rate costs in samples, the risk over learning rate and noise and over the exponents of width and rate.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _phase_diagram as preset
    from gradflow.sweeps import check_writable, write_dataset

    name = "phase-diagram-quick" if quick else "phase-diagram"
    check_writable("out", out / f"{name}.zarr")
    size = _given(preset.QUICK if quick else {}, noise=noise, seeds=seeds, units=units, width=width)
    parts = out / f"{name}-parts"
    with _resumable(_again()):
        ds = studies.phase_diagram(**size, store=parts, resume=not fresh)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


@app.command("vanishing-init", short_help="Escape from weights of norm 1e-4 down to 1e-300.")
def vanishing_init(
    quick: Quick = False,
    data: Annotated[
        str, typer.Option("--data", help="`circle`, `teacher`, `orthogonal`, or a name from `gradflow info`.")
    ] = "digits",
    path: Path = None,
    samples: Samples = None,
    classes: Annotated[tuple[int, int] | None, typer.Option("--classes", help="Two classes.")] = (0, 1),
    every_class: Annotated[bool, typer.Option("--all-classes", help="All classes, with one output each.")] = False,
    loss: Annotated[str, typer.Option("--loss", help="square, or logistic for two classes.")] = "square",
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; 3, or 1 with --quick.")] = None,
) -> None:
    """Escape from initial weights of norm 1e-4 down to 1e-300, beside what theory predicts without training.

    ReLU networks in polar coordinates: escape times, the direction of every neuron, the saddles that follow. With
    `--data circle`: gradient descent on squared-ReLU neurons beside its flow, in the settings of the source.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _circle
    from gradflow.studies import _vanishing_init as preset
    from gradflow.sweeps import check_writable, write_dataset

    name = "circle" if data == "circle" else "vanishing-init"
    name += "-quick" if quick else ""
    store = out / f"{name}.zarr"
    check_writable("out", store)
    if data == "circle":
        if seeds is not None or path is not None:
            raise fail("seeds" if path is None else "path", "be left out with --data circle", "given")
        ds = studies.circle_illustration(_circle.load_data(samples), **_given(_circle.QUICK if quick else {}))
    else:
        chosen = None if every_class else classes
        dataset = preset.load_data(data, path=path, samples=samples, classes=chosen, quick=quick)
        size = _given(preset.QUICK if quick else {}, seeds=None if seeds is None else range(seeds))
        with _resumable(_again()):
            ds = studies.vanishing_init(dataset, loss=loss, **size, store=out / f"{name}-runs.zarr", resume=not fresh)
    write_dataset(ds, store)
    _report(ds, store, out / f"{name}.png")
    if "status" in ds:
        _end_with(ds.status)


@app.command("early-stage", short_help="Loss drop, living and dead neurons, late phase.")
def early_stage(
    quick: Quick = False,
    data: Annotated[
        str,
        typer.Option("--data", help="`correlated`, `two-directions`, or a name from `gradflow info`."),
    ] = "correlated",
    path: Path = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Number of samples; 20 generated ones, or 100 of a data set.")
    ] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes.")] = (0, 1),
    every_class: Annotated[bool, typer.Option("--all-classes", help="All classes, with one output each.")] = False,
    out: Out = pathlib.Path("gradflow-out"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the starts.")] = 0,
) -> None:
    """Early training of ReLU networks: loss drop in 1/eta steps, which neurons live or die, t * loss in the late phase.

    Over widths, learning rates, losses and batches of SGD, with shuffled labels as a control. With
    `--data two-directions`: plateau, escape and sliding neurons on two nearby inputs, beside descent that gets stuck.
    """
    configure_jax()
    from gradflow import studies
    from gradflow.studies import _early_stage as preset
    from gradflow.studies import _two_directions
    from gradflow.sweeps import check_writable, write_dataset

    name = f"early-stage-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    if data == "two-directions":
        ds = studies.two_directions(**_given(_two_directions.QUICK if quick else {}, seed=seed))
    else:
        chosen = None if every_class else classes
        dataset = preset.load_data(data, path=path, samples=samples, classes=chosen, seed=seed, quick=quick)
        ds = studies.early_stage(dataset, **_given(preset.quick(not every_class) if quick else {}, seed=seed))
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(ds, store, out / f"{name}.png")


def _given(preset: Mapping[str, object], **options: object) -> dict[str, Any]:
    """Arguments of a study: its preset, and what the command line names; the study decides about the rest."""
    return {**preset, **{name: value for name, value in options.items() if value is not None}}


def _chunk(given: str | None) -> tuple[int, int] | None:
    """`k/n` as a pair that counts from zero."""
    if given is None:
        return None
    words = given.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        raise fail("chunk", "be k/n with 1 <= k <= n", repr(given), "For instance --chunk 2/8.")
    return int(words[0]) - 1, int(words[1])


def _again() -> str:
    """The command that goes on with this one."""
    return shlex.join(["gradflow", *(word for word in sys.argv[1:] if word != "--fresh")])


def _say_what_is_there(store: pathlib.Path, fresh: bool) -> None:
    """One line if a store is about to be resumed; other contents are left to the study to refuse."""
    from gradflow.sweeps import open_store

    if fresh or not store.exists():
        return
    stored = open_store(store)
    if "config" in stored.attrs:
        done = int((stored["status"] >= 0).sum())
        print(f"resuming {store}: {done} of {stored['status'].size} flows are there (--fresh starts over)")


def _report(ds: "xr.Dataset", store: pathlib.Path, target: pathlib.Path) -> None:
    """Prints the table of a study, draws its figure, and says where both lie."""
    from gradflow import plot, tables
    from gradflow.stores._zarr_group import annotate

    annotate(store, command=_again())
    figure = plot.save(plot.draw(ds), target)
    print(tables.text(ds))
    print(f"\nstore:  {store}  ({', '.join(f'{size} {dim}' for dim, size in ds.sizes.items())})")
    print(f"figure: {figure}")


def _end_with(status: "xr.DataArray") -> None:
    """Ends with code 1 if flows failed, and says how, and what helps."""
    failed = [Status(int(code)) for code in np.ravel(status.values) if code > Status.STOPPED]
    if failed:
        remedy = "; ".join(sorted(f"{one.label}: {one.remedy}" for one in set(failed)))
        print(f"gradflow: {len(failed)} of {status.size} flows ended early: {remedy}", file=sys.stderr)
        raise typer.Exit(1)
