"""The command `gradflow`: small-init, vanishing-init, compare, mean-field, momentum and other studies, and tools."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any, cast

import typer

from gradflow._checks import fail
from gradflow.cli._process import Commands, configure_jax

app = typer.Typer(
    cls=Commands,
    help="Neural-network training as a dynamical system: exact gradient flows beside the optimisers they idealise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)

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


def main() -> None:
    """Entry point of the command `gradflow`."""
    app()


def _version(asked: bool) -> None:
    if asked:
        import gradflow

        print(f"gradflow {gradflow.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Neural-network training as a dynamical system: exact gradient flows beside the optimisers they idealise."""


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
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes to tell apart.")] = (0, 1),
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
    the neurons and saddles beside what theory foretells, the cost of the flow and of gradient descent as accurate.
    Scales that no float holds, and other data sets, are those of `gradflow vanishing-init`.
    """
    configure_jax()
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable

    rtol = (1e-3 if quick else 1e-4) if rtol is None else rtol
    samples = 120 if quick and samples is None else samples
    dataset = _load(data, path, samples, classes=classes, centre=True, unit_norm=True, labels="pm1")
    size: dict[str, Any] = {"seeds": range(3 if seeds is None else seeds)}
    if quick:
        few = {"scales": (1e-2, 1e-4, 1e-6), "widths": (16,), "saves": 121}
        size = few | {"seeds": range(1 if seeds is None else seeds)}
    name = "small-init-quick" if quick else "small-init"
    store = out / f"{name}.zarr"
    check_writable("out", store)
    part = _chunk(chunk)
    _say_what_is_there(store, fresh)
    with _resumable(_again()):
        ds = studies.small_init(dataset, **size, rtol=rtol, store=store, resume=not fresh, chunk=part)
    missing = int((ds.status < 0).sum())
    if missing:
        print(f"store: {store}: {ds.status.size - missing} of {ds.status.size} runs, the others are for other chunks")
        return
    _report(studies.small_init_table(ds), store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("compare", short_help="Gradient descent or momentum against its flows.")
def compare(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Samples = None,
    rule: Annotated[
        str, typer.Option("--rule", help="gradient-descent, heavy-ball or nesterov; momentum is 0.9.")
    ] = "gradient-descent",
    width: Annotated[int, typer.Option("--width", help="Width of the hidden layers.")] = 64,
    depth: Annotated[int, typer.Option("--depth", help="Number of hidden layers.")] = 2,
    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Flow time to compare on; 50, or 10 with --quick and descent.")
    ] = None,
    out: Out = pathlib.Path("gradflow-out"),
) -> None:
    """A discrete rule against its flows: the gap over learning rates, its order, and what accuracy costs."""
    configure_jax()
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    dataset = _load(data, path, 100 if quick and samples is None else samples, centre=True, labels="onehot")
    name = "compare" + ("" if rule == "gradient-descent" else f"-{rule}") + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    if horizon is None:
        # The transient of momentum takes its time.
        horizon = 10.0 if quick and rule == "gradient-descent" else 50.0
    if quick:
        size = {"width": min(width, 16), "depth": 1, "rates": 4, "horizon": horizon}
    else:
        size = {"width": width, "depth": depth, "rates": 6, "horizon": horizon}
    ds = studies.discrete_gap(dataset, rule=rule, **cast(dict[str, Any], size))
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(studies.compare_table(ds), store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("mean-field", short_help="Networks of growing width beside width infinity.")
def mean_field(
    quick: Quick = False,
    data: Annotated[
        str, typer.Option("--data", help="`sine`, a regression in one dimension, or a name: two components of it.")
    ] = "sine",
    path: Path = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Number of samples; 20, 100 of a data set.")] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes to tell apart.")] = (0, 1),
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Seeds of the widest; 16, or 8 with --quick.")] = None,
) -> None:
    """Infinite width as one more width: networks of 8 ... 1024 nodes, and SGD, beside their limit.

    Deviation and bias by width and depth beside what theory foretells, rules of nodes, test particles.
    """
    configure_jax()
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    name = f"mean-field-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    dataset = _planar_data(data, path, samples, classes)
    few: dict[str, Any] = {}
    if quick:
        few = {"widths": (16,), "depths": (2,), "sgd_widths": (16,), "saves": 6, "horizon": 3.0, "more": 1}
        few |= {"node_counts": (), "nodes": 4, "accuracy": 1e-3}
    few["seeds"] = (8 if quick else 16) if seeds is None else seeds
    with _resumable(_again()):
        ds = studies.mean_field(dataset, **few, store=out / f"{name}-runs.zarr", resume=not fresh)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(studies.mean_field_table(ds), store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("momentum", short_help="Heavy ball and Nesterov: flows, rates, which is faster.")
def momentum(
    quick: Quick = False,
    data: Data = "digits",
    path: Path = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Number of samples; 40, or 24 with --quick.")] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes to tell apart.")] = (0, 1),
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the methods; by default enough to settle.")
    ] = None,
    out: Out = pathlib.Path("gradflow-out"),
) -> None:
    """Heavy ball and Nesterov on wide ReLU networks: flows, rates per mode, which is faster, movement of neurons."""
    configure_jax()
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    samples = (24 if quick else 40) if samples is None else samples
    dataset = _load(data, path, samples, classes=classes, centre=True, unit_norm=True, labels="pm1")
    name = f"momentum-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    size: dict[str, Any] = {"widths": (64, 256), "ratios": (0.1, 4.0), "saves": 60} if quick else {}
    ds = studies.momentum(dataset, **size, steps=200 if quick and steps is None else steps)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(studies.momentum_table(ds), store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


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
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    name = "phase-diagram-quick" if quick else "phase-diagram"
    check_writable("out", out / f"{name}.zarr")
    size: dict[str, Any] = {"noise": noise, "seeds": (2 if quick else 4) if seeds is None else seeds}
    size |= {"units": (2 if quick else 4) if units is None else units}
    size |= {"width": (4 if quick else 8) if width is None else width}
    if quick:
        size |= {"dims": (50, 200), "starts": (50, 500), "rates": (0.1, 0.3, 1.0, 3.0), "noises": (1e-5, 1e-4, 1e-3)}
        size |= {"saves": 21, "horizon": 1e3, "horizons": {"green": 5.0, "blue": 20.0, "orange": 20.0}}
        size |= {"kappas": (0.1,), "sums": (-0.4, -0.2, 0.0, 0.2, 0.4)}
    parts = out / f"{name}-parts"
    with _resumable(_again()):
        ds = studies.phase_diagram(**size, store=parts, resume=not fresh)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(studies.phase_diagram_table(ds), store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("vanishing-init", short_help="Escape from weights of norm 1e-4 down to 1e-300.")
def vanishing_init(
    quick: Quick = False,
    data: Annotated[
        str, typer.Option("--data", help="`circle`, `teacher`, `orthogonal`, or a name from `gradflow info`.")
    ] = "digits",
    path: Path = None,
    samples: Samples = None,
    classes: Annotated[tuple[int, int] | None, typer.Option("--classes", help="Two classes to tell apart.")] = (0, 1),
    every_class: Annotated[bool, typer.Option("--all-classes", help="All classes, with one output each.")] = False,
    loss: Annotated[str, typer.Option("--loss", help="square, or logistic for two classes.")] = "square",
    out: Out = pathlib.Path("gradflow-out"),
    fresh: Fresh = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; 3, or 1 with --quick.")] = None,
) -> None:
    """Escape from initial weights of norm 1e-4 down to 1e-300, beside what theory foretells without training.

    ReLU networks in polar coordinates: escape times, the direction of every neuron, the saddles that follow. With
    `--data circle`: gradient descent on squared-ReLU neurons beside its flow, in the settings of the source.
    """
    configure_jax()
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    name = "circle" if data == "circle" else "vanishing-init"
    name += "-quick" if quick else ""
    store = out / f"{name}.zarr"
    check_writable("out", store)
    if data == "circle":
        if seeds is not None or path is not None:
            raise fail("seeds" if path is None else "path", "be left out with --data circle", "given")
        dataset = _load(data, None, samples if samples is not None else 50)
        ds = studies.circle_illustration(dataset, **({"steps": 20_000, "width": 8} if quick else {}))
        table = studies.circle_table(ds)
    else:
        dataset = _small_data(
            data, path, 60 if quick and samples is None else samples, None if every_class else classes
        )
        few: dict[str, Any] = {"exponents": (4, 12, 300), "widths": (4,), "saves": 101, "rounds": 1} if quick else {}
        few |= {"seeds": range((1 if quick else 3) if seeds is None else seeds)}
        with _resumable(_again()):
            ds = studies.vanishing_init(dataset, loss=loss, **few, store=out / f"{name}-runs.zarr", resume=not fresh)
        table = studies.vanishing_init_table(ds)
    write_dataset(ds, store)
    _report(table, store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("early-stage", short_help="Loss drop, living and dead neurons, late phase.")
def early_stage(
    quick: Quick = False,
    data: Annotated[
        str,
        typer.Option("--data", help="`correlated`, `two-directions`, or a name from `gradflow info`."),
    ] = "correlated",
    path: Path = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Number of samples; 20 made ones, 100 of a data set.")
    ] = None,
    classes: Annotated[tuple[int, int], typer.Option("--classes", help="The two classes to tell apart.")] = (0, 1),
    every_class: Annotated[bool, typer.Option("--all-classes", help="All classes, with one output each.")] = False,
    out: Out = pathlib.Path("gradflow-out"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the starts.")] = 0,
) -> None:
    """Early training of ReLU networks: loss drop in 1/eta steps, who lives and dies, t * loss in the late phase.

    Over widths, learning rates, losses and batches of SGD, with shuffled labels as a control. With
    `--data two-directions`: plateau, escape and sliding neurons on two nearby inputs, beside descent that gets stuck.
    """
    configure_jax()
    from gradflow import data as sets
    from gradflow import plot, studies
    from gradflow.sweeps import check_writable, write_dataset

    name = f"early-stage-{data}" + ("-quick" if quick else "")
    check_writable("out", out / f"{name}.zarr")
    if data == "two-directions":
        few: dict[str, Any] = {"angles": (0.1, 0.05, 0.025), "steps": 20_000, "saves": 201} if quick else {}
        ds = studies.two_directions(**few, seed=seed)
        table = studies.two_directions_table(ds)
    else:
        if data == "correlated":
            dataset = sets.correlated(20 if samples is None else samples, 8, seed=seed)
        else:
            kind = {"labels": "index"} if every_class else {"classes": classes, "labels": "pm1"}
            size = (40 if quick else 100) if samples is None else samples
            dataset = _load(data, path, size, centre=True, unit_norm=True, **kind)
        few = {"widths": (8, 64), "rates": (0.1, 0.01), "batches": (2,), "saves": 41} if quick else {}
        if quick and not every_class:
            few |= {"losses": ("exponential", "square")}
        ds = studies.early_stage(dataset, **few, seed=seed)
        table = studies.early_stage_table(ds)
    store = write_dataset(ds, out / f"{name}.zarr")
    _report(table, store, plot.save(plot.draw(ds), out / f"{name}.png"), ds)


@app.command("plot", short_help="Draws the figure of a stored study again.")
def plot_store(
    store: Annotated[pathlib.Path, typer.Argument(help="A zarr store that a study wrote.")],
    out: Annotated[pathlib.Path | None, typer.Option("--out", help="File to write; .png, .pdf or .svg.")] = None,
) -> None:
    """Draws the figure of a stored study again."""
    from gradflow import plot
    from gradflow.sweeps import open_store

    target = store.with_suffix(".png") if out is None else out
    print(f"figure: {plot.save(plot.draw(open_store(store)), target)}")


@app.command("info", short_help="Versions and everything on offer, or what a store holds.")
def info(
    store: Annotated[pathlib.Path | None, typer.Argument(help="A zarr store, to be described.")] = None,
) -> None:
    """Versions, devices and what the package offers; with a store, what it holds and how it was computed."""
    from gradflow.cli._info import describe_installation, describe_store

    print(describe_installation() if store is None else describe_store(store))


@app.command("export", short_help="Writes a store as one netCDF file.")
def export(
    store: Annotated[pathlib.Path, typer.Argument(help="A zarr store that a study or a sweep wrote.")],
    file: Annotated[pathlib.Path, typer.Argument(help="The netCDF file to write.")],
) -> None:
    """Writes a store as one netCDF file."""
    from gradflow.sweeps import to_netcdf

    print(f"netCDF: {to_netcdf(store, file)}")


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
    return " ".join(["gradflow", *(word for word in sys.argv[1:] if word != "--fresh")])


def _load(name: str, path: str | None, samples: int | None, **options: Any) -> Any:
    """The data set; without a wish at most 500 samples of it, so that a study stays within minutes."""
    from gradflow import data

    chosen = options | ({} if path is None else {"path": path})
    if samples is not None:
        return data.load(name, n=samples, **chosen)
    found = data.load(name, **chosen)
    return found if len(found) <= 500 else data.load(name, n=500, **chosen)


def _small_data(name: str, path: str | None, samples: int | None, classes: tuple[int, int] | None) -> Any:
    """Data for vanishing initialisation: images of two classes or of all, or made."""
    from gradflow import data

    if name == "teacher":
        return data.gaussian_teacher(100 if samples is None else samples, 10, 3)
    if name == "orthogonal":
        count = 8 if samples is None else samples
        return data.orthogonal_inputs(count, count)
    kind = {"classes": classes, "labels": "pm1"} if classes is not None else {"labels": "onehot"}
    return _load(name, path, samples, centre=True, unit_norm=True, **kind)


def _planar_data(name: str, path: str | None, samples: int | None, classes: tuple[int, int]) -> Any:
    """Inputs of two entries: points on a line beside a constant, or two principal components of a data set."""
    import numpy as np

    from gradflow.data import Dataset

    if name == "sine":
        line = np.linspace(-1, 1, 20 if samples is None else samples)
        return Dataset(np.stack([line, np.ones_like(line)], axis=1), np.sin(np.pi * line), name="sine")
    found = _load(name, path, 100 if samples is None else samples, classes=classes, centre=True, labels="pm1")
    x = np.asarray(found.x, float).reshape(len(found), -1)
    parts = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    projected = parts[0][:, :2] * parts[1][:2]
    return Dataset(projected / np.abs(projected).max(), np.asarray(found.y, float), name=f"{name}, two components")


def _say_what_is_there(store: pathlib.Path, fresh: bool) -> None:
    """One line if a store is about to be resumed; whatever else lies there is left to the study to refuse."""
    from gradflow.sweeps import open_store

    if fresh or not store.exists():
        return
    found = open_store(store)
    if "config" in found.attrs:
        done = int((found["status"] >= 0).sum())
        print(f"resuming {store}: {done} of {found['status'].size} flows are there (--fresh starts over)")


def _report(table: str, store: pathlib.Path, figure: pathlib.Path, ds: Any) -> None:
    print(table)
    print(f"\nstore:  {store}  ({', '.join(f'{size} {dim}' for dim, size in ds.sizes.items())})")
    print(f"figure: {figure}")
