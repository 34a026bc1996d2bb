"""Initial laws of mean-field networks: draws of any width, and nodes for width infinity."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from gradflow._checks import TheoryWarning, check_callable, check_count, fail
from gradflow.models._mean_field_net import MeanFieldNet
from gradflow.models._parametrisation import resolve_dtype
from gradflow.models.nodes import AbstractLaw, AbstractNodeRule, Uniform, default_rule

Kernel = Callable[[Array, Array], Array]
"""A weight as a function `(label, label) -> scalar` of the labels of the nodes that it joins."""
Labels = Float[Array, "_ _"] | Float[np.ndarray, "_ _"]
Width = float | int | np.integer | np.floating | Array | np.ndarray | Sequence[int]
"""A number of nodes, or one for each hidden layer."""


class MeanFieldNodes(NamedTuple):
    """A network and the weights of its nodes.

    One array of weights for each hidden layer: `1 / N`, or those of a quadrature.
    """

    net: MeanFieldNet
    weights: tuple[Float[Array, " _"], ...]

    def with_particles(self, first: PyTree[ArrayLike] = None, last: PyTree[ArrayLike] = None) -> "MeanFieldNodes":
        """Adds test particles: nodes of weight zero, which follow the others without being seen.

        **Arguments**: `first`: incoming weights `(k, d)` of nodes of the first layer; `last`: outgoing weights `(k,)`
        of nodes of the last. Their other weights are the means of those of the nodes there are, which are theirs where
        these are independent. With one hidden layer both are needed, of one length.

        **Raises** `ValueError` for weights of another shape.
        """
        net, weights = self.net, list(self.weights)
        layers, output = list(net.layers), net.output
        dtype = output.dtype
        if first is not None:
            rows = _particles("first", first, layers[0].shape[1:], dtype)
            layers[0] = jnp.concatenate([layers[0], rows])
            weights[0] = jnp.concatenate([weights[0], jnp.zeros(len(rows), dtype)])
            if len(layers) > 1:
                mean = jnp.tensordot(self.weights[0], layers[1], axes=1)[None]
                layers[1] = jnp.concatenate([layers[1], jnp.repeat(mean, len(rows), axis=0)])
        if last is not None:
            rows = _particles("last", last, output.shape[1:], dtype)
            output = jnp.concatenate([output, rows])
            if len(layers) > 1:
                weights[-1] = jnp.concatenate([weights[-1], jnp.zeros(len(rows), dtype)])
                mean = (layers[-1] @ self.weights[-1])[:, None]
                layers[-1] = jnp.concatenate([layers[-1], jnp.repeat(mean, len(rows), axis=1)], axis=1)
        if len(layers) == 1 and layers[0].shape[0] != output.shape[0]:
            raise fail("first", "have as many rows as `last` with one hidden layer", "not", "A node has both.")
        return MeanFieldNodes(MeanFieldNet(layers, output, net.activation), tuple(weights))

    def padded(self, widths: Sequence[int]) -> "MeanFieldNodes":
        """The same with copies of the first node of every layer added, of weight zero, up to these widths."""
        net, own_widths = self.net, self.net.widths
        if any(n > m for n, m in zip(own_widths, widths, strict=True)):
            raise fail("widths", f"be at least {own_widths}", f"{tuple(widths)}")
        # Index zero stands for what is added.
        take = [jnp.where(jnp.arange(m) < n, jnp.arange(m), 0) for n, m in zip(own_widths, widths, strict=True)]
        layers = [net.layers[0][take[0]]]
        layers += [layer[take[i]][:, take[i + 1]] for i, layer in enumerate(net.layers[1:])]
        weights = tuple(
            jnp.concatenate([p, jnp.zeros(m - p.shape[0], p.dtype)]) for p, m in zip(self.weights, widths, strict=True)
        )
        return MeanFieldNodes(MeanFieldNet(layers, net.output[take[-1]], net.activation), weights)


class MeanFieldStart(eqx.Module):
    """Initial laws of a mean-field network, of any width or of width infinity.

    Entries of its `L` hidden layers are independent unless given as kernels.

    - `draw(width, key)`: a finite network, drawn at random, with node weights `1 / N`.
    - `nodes(rule)`: width infinity, by quadrature over the initial values that label its nodes.
    - `at(width, key)`: either, by the width.

    **The limit in labels.** A node of the first layer is labelled by its incoming weights `w`, one of the last by its
    outgoing weight `c`, with one hidden layer one by both. An entry `u` of a layer between moves by an amount that does
    not depend on `u`, so only its mean enters: `W(w, c) = E[u] + A(w, c)`. With three or more hidden layers and
    independent entries, all nodes of a layer in the interior start, and stay, equal: such a layer has one node. With a
    kernel `K`, the entry between nodes of labels `a` and `b` starts at `K(a, b)`; interior layers that it joins have
    labels of their own, with the law `interior`, and do not collapse.

    **Arguments**

    - `in_size`: `d`. `out_size`: `k`, or `None` for a scalar output.
    - `first`: law of the entries of `W_1`, or a sequence of `d` laws. `output`: law of `C`, or a sequence of `k` laws.
    - `middle`: for `W_2 ... W_L` each a law or a kernel `(label, label) -> scalar` of two vectors; `()` for one layer.
    - `activation`: elementwise. `dtype`: of the weights.
    - `interior`: law of the labels of interior layers, by default uniform on `[0, 1]`.

    **Raises** `ValueError` for sizes below one, laws of the wrong number or kind, and an activation that cannot be
    called; `draw` and `nodes` for widths or rules of the wrong number. `nodes` **warns** (`TheoryWarning`) of unbounded
    laws.

    **Source**: Sirignano and Spiliopoulos 2019, arXiv 1903.04440; labels and kernels: Nguyen and Pham 2020, arXiv
    2001.11443.

    >>> import gradflow as gf, jax
    >>> from gradflow.models.nodes import GaussLegendre, Uniform
    >>> laws = {"first": Uniform(-1, 1), "middle": [Uniform(0, 1)], "output": Uniform(-1, 1)}
    >>> start = gf.models.MeanFieldStart(2, **laws)
    >>> start.nodes(GaussLegendre(6)).net.widths, start.draw(50, jax.random.key(0)).net.widths
    ((36, 6), (50, 50))
    """

    first: tuple[AbstractLaw, ...]
    middle: tuple[AbstractLaw | Kernel, ...]
    output: tuple[AbstractLaw, ...]
    interior: AbstractLaw
    activation: Callable[[Array], Array] = eqx.field(static=True)
    out_size: int | None = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        *,
        first: AbstractLaw | Sequence[AbstractLaw],
        middle: Sequence[AbstractLaw | Kernel] = (),
        output: AbstractLaw | Sequence[AbstractLaw],
        activation: Callable[[Array], Array] = jnp.tanh,
        out_size: int | None = None,
        interior: AbstractLaw | None = None,
        dtype: DTypeLike | None = None,
    ):
        check_count("in_size", in_size)
        if out_size is not None:
            check_count("out_size", out_size, advice="Use None for a scalar output.")
        check_callable("activation", activation, "activation(array)")
        self.first = _laws("first", first, in_size)
        self.output = _laws("output", output, out_size or 1)
        if isinstance(middle, AbstractLaw) or callable(middle):
            raise fail(
                "middle", "be a sequence, with an entry for each layer between", f"of type {type(middle).__name__}"
            )
        for number, entry in enumerate(middle):
            if not isinstance(entry, AbstractLaw) and not callable(entry):
                must = "be a law of gradflow.models.nodes, or a kernel (label, label) -> scalar"
                raise fail(f"middle[{number}]", must, f"of type {type(entry).__name__}")
        self.middle = tuple(middle)
        self.interior = _laws("interior", Uniform(0.0, 1.0) if interior is None else interior, 1)[0]
        self.activation, self.out_size, self.dtype = activation, out_size, resolve_dtype(dtype)

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return len(self.middle) + 1

    @property
    def labels(self) -> tuple[tuple[AbstractLaw, ...], ...]:
        """The laws of the labels of every hidden layer; none for a layer that collapses to one node."""
        if self.depth == 1:
            return (self.first + self.output,)
        between = []
        for below, above in itertools.pairwise(self.middle):
            labelled = not (isinstance(below, AbstractLaw) and isinstance(above, AbstractLaw))
            between.append((self.interior,) if labelled else ())
        return (self.first, *between, self.output)

    def rules(self, rule: AbstractNodeRule | Sequence[AbstractNodeRule] | None = None) -> tuple[AbstractNodeRule, ...]:
        """One rule for the labels of each layer, from one for all, or from `None` for those that suit."""
        rules = tuple(default_rule(laws) for laws in self.labels) if rule is None else rule
        rules = (rules,) * self.depth if isinstance(rules, AbstractNodeRule) else tuple(rules)
        if len(rules) != self.depth or not all(isinstance(r, AbstractNodeRule) for r in rules):
            raise fail("rule", f"be a rule of gradflow.models.nodes, or {self.depth} of them", f"{rule!r}")
        return rules

    def nodes(self, rule: AbstractNodeRule | Sequence[AbstractNodeRule] | None = None) -> MeanFieldNodes:
        """Width infinity: nodes of a rule, or of one rule for each hidden layer; see `rules`."""
        rules = self.rules(rule)
        if not all(law.bounded for law in (*self.first, *self.output, *filter(_is_law, self.middle))):
            warnings.warn(
                "The theorems on mean-field limits ask for initial laws of bounded support, which a Gaussian is not."
                " Nodes reach as far as their rule does.",
                TheoryWarning,
                stacklevel=2,
            )
        labels, weights = [], []
        for laws, layer_rule in zip(self.labels, rules, strict=True):
            points, mass = layer_rule(laws) if laws else (np.zeros((1, 0)), np.ones(1))
            labels.append(points)
            weights.append(jnp.asarray(mass, self.dtype))
        middle = [self._constant(entry, labels[i], labels[i + 1]) for i, entry in enumerate(self.middle)]
        return MeanFieldNodes(self._assemble(labels, middle), tuple(weights))

    def draw(self, width: Width, key: Key[Array, ""]) -> MeanFieldNodes:
        """A finite network; one width, or one for each hidden layer. `jax.vmap` over keys draws many."""
        widths = _widths(width, self.depth)
        keys = (jax.random.fold_in(key, number) for number in itertools.count())
        labels = [
            jnp.stack([law.draw(next(keys), (n,), self.dtype) for law in laws], axis=1) if laws else np.zeros((n, 0))
            for laws, n in zip(self.labels, widths, strict=True)
        ]
        middle = []
        for i, entry in enumerate(self.middle):
            if isinstance(entry, AbstractLaw):
                middle.append(entry.draw(next(keys), (widths[i], widths[i + 1]), self.dtype))
            else:
                middle.append(self._constant(entry, labels[i], labels[i + 1]))
        weights = tuple(jnp.full(n, 1 / n, self.dtype) for n in widths)
        return MeanFieldNodes(self._assemble(labels, middle), weights)

    def at(
        self, width: Width, key: Key[Array, ""], rule: AbstractNodeRule | Sequence[AbstractNodeRule] | None = None
    ) -> MeanFieldNodes:
        """The finite network of that width, or for `inf` the nodes of the limit: a value like others on an axis."""
        if isinstance(width, Sequence) or np.ndim(width):
            return self.draw(width, key)
        return self.nodes(rule) if np.isinf(float(width)) else self.draw(int(width), key)

    def _constant(self, entry: AbstractLaw | Kernel, below: Labels, above: Labels) -> Float[Array, "below above"]:
        """The mean of independent entries, or a kernel at all pairs of labels."""
        if isinstance(entry, AbstractLaw):
            return jnp.full((len(below), len(above)), entry.mean, self.dtype)
        pairs = jax.vmap(jax.vmap(entry, (None, 0)), (0, None))
        value = pairs(jnp.asarray(below, self.dtype), jnp.asarray(above, self.dtype))
        if value.shape != (len(below), len(above)):
            raise fail("middle", "hold kernels that return scalars", f"with one that returns shape {value.shape[2:]}")
        return jnp.asarray(value, self.dtype)

    def _assemble(self, labels: list[Labels], middle: list[Array]) -> MeanFieldNet:
        size = len(self.first)
        first = jnp.asarray(labels[0][:, :size], self.dtype)
        output = jnp.asarray(labels[-1] if self.depth > 1 else labels[-1][:, size:], self.dtype)
        return MeanFieldNet((first, *middle), output[:, 0] if self.out_size is None else output, self.activation)


def _widths(width: Width, depth: int) -> tuple[int, ...]:
    """The width of every hidden layer."""
    if isinstance(width, Sequence):
        widths = tuple(width)
    else:
        widths = tuple(width) if isinstance(width, np.ndarray) and width.ndim else (width,) * depth
    if len(widths) != depth:
        raise fail("width", f"be one number, or {depth}", f"{len(widths)} numbers")
    for n in widths:
        check_count("width", n)
    return tuple(int(n) for n in widths)


def _is_law(entry: object) -> TypeGuard[AbstractLaw]:
    return isinstance(entry, AbstractLaw)


def _laws(argument: str, given: AbstractLaw | Sequence[AbstractLaw], count: int) -> tuple[AbstractLaw, ...]:
    laws = (given,) * count if isinstance(given, AbstractLaw) else given
    if not isinstance(laws, Sequence) or not all(isinstance(law, AbstractLaw) for law in laws):
        advice = "For instance gradflow.models.nodes.Uniform(-1, 1)."
        raise fail(argument, "be a law of gradflow.models.nodes, or a sequence of them", f"{given!r}", advice)
    if len(laws) != count:
        raise fail(argument, f"be one law or {count}, one for each entry", f"{len(laws)} laws")
    return tuple(laws)


def _particles(argument: str, given: PyTree[ArrayLike], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    rows = jnp.asarray(given, dtype)
    if rows.shape[1:] != shape or rows.ndim != len(shape) + 1:
        raise fail(argument, f"have shape (k, {', '.join(map(str, shape))})", f"of shape {rows.shape}")
    return rows
