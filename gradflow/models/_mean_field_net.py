"""Networks whose layers average over nodes: finite ones, padded ones, and the limit of infinite width."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gradflow._checks import fail


class MeanFieldNet(eqx.Module):
    """A network whose `L` hidden layers average over nodes of weights `p_l`:

        Y_1 = W_1 x,    H_l = s(Y_l),    Y_l = sum_j p_{l-1,j} W_l[j] H_{l-1,j},    g(x) = sum_i p_{L,i} C_i H_{L,i}

    Called on an input, it is the finite network, `p_l = 1 / N_l`. `gradflow.MeanFieldFlow` gives it other weights.

    **Arguments**: `layers`: `W_1 (N_1, d)`, then `W_l (N_{l-1}, N_l)`; `output`: `C (N_L,)` or `(N_L, k)`;
    `activation`: elementwise function. Usually made by `gradflow.models.MeanFieldStart`.

    **Raises** `ValueError` for no layers, and for layers that do not fit each other.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> net = gf.models.MeanFieldNet((jnp.ones((4, 2)), jnp.ones((4, 3))), jnp.ones(3), activation=jnp.tanh)
    >>> round(float(net(jnp.ones(2))), 4) == round(float(jnp.tanh(jnp.tanh(2.0))), 4)
    True
    """

    layers: tuple[Float[Array, "_ _"], ...]
    output: Float[Array, "nodes *out_size"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(self, layers: Sequence[Array], output: Array, activation: Callable[[Array], Array] = jnp.tanh):
        self.layers, self.output, self.activation = tuple(layers), output, activation
        if not self.layers:
            raise fail("layers", "hold at least the first layer", "empty")
        above = [layer.shape[0] for layer in self.layers[1:]] + [output.shape[0]]
        for number, (nodes, size) in enumerate(zip(self.widths, above, strict=True), start=1):
            if nodes != size:
                raise fail("layers", "fit each other", f"with {nodes} nodes in layer {number} and {size} above it")

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of nodes of each hidden layer."""
        return (self.layers[0].shape[0], *(layer.shape[1] for layer in self.layers[1:]))

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, "*out_size"]:
        """The prediction of the finite network."""
        weights = tuple(jnp.full(n, 1 / n, x.dtype) for n in self.widths)
        return self.predictions(x[None], weights)[0]

    def predictions(
        self, x: Float[Array, "n in_size"], weights: tuple[Float[Array, " _"], ...]
    ) -> Float[Array, "n *out_size"]:
        """Predictions with node weights of one's own, for a whole batch of inputs."""
        hidden = self.activation(x @ self.layers[0].T)
        for layer, p in zip(self.layers[1:], weights, strict=False):
            hidden = self.activation((hidden * p[None, :]) @ layer)
        return jnp.tensordot(hidden * weights[-1][None, :], self.output, axes=1)

    def velocity(
        self,
        x: Float[Array, "n in_size"],
        weights: tuple[Float[Array, " _"], ...],
        residuals_of: Callable[[Float[Array, "n *out_size"]], Float[Array, "n *out_size"]],
    ) -> "MeanFieldNet":
        """The mean-field drift: the negative gradient of the risk over the weights of the nodes that an entry joins.

        With `e = residuals_of(g)`, the residuals `-dL/dg`, one number per sample and output:

            C' = H_L^T e,    D_L = (e C^T) s'(Y_L),    W_l' = H_{l-1}^T D_l,    D_{l-1} = (D_l p_l) W_l^T s'(Y_{l-1}),
            W_1' = D_1^T x

        No division by a weight: nodes of weight zero move as well, and influence nothing.
        """

        def both(y: Array) -> tuple[Array, Array]:
            return jax.jvp(self.activation, (y,), (jnp.ones_like(y),))

        levels = [both(x @ self.layers[0].T)]
        for layer, p in zip(self.layers[1:], weights, strict=False):
            levels.append(both((levels[-1][0] * p[None, :]) @ layer))
        top = levels[-1][0]
        residuals = residuals_of(jnp.tensordot(top * weights[-1][None, :], self.output, axes=1)).astype(x.dtype)
        output = jnp.tensordot(top.T, residuals, axes=1)
        nodes = self.output.shape[0]
        back = (residuals.reshape(x.shape[0], -1) @ self.output.reshape(nodes, -1).T) * levels[-1][1]
        velocities = []
        for number in range(len(self.layers) - 1, 0, -1):
            hidden, slope = levels[number - 1]
            velocities.append(hidden.T @ back)
            back = ((back * weights[number][None, :]) @ self.layers[number].T) * slope
        layers = (back.T @ x, *reversed(velocities))
        return eqx.tree_at(lambda net: (net.layers, net.output), self, (layers, output))

    def squares(self, weights: tuple[Float[Array, " _"], ...]) -> Float[Array, " layers"]:
        """Mean square of every layer, the output last, over the labels of the nodes that its entries join."""
        sums = [weights[0] @ jnp.sum(self.layers[0] ** 2, axis=1)]
        for number, layer in enumerate(self.layers[1:]):
            sums.append(weights[number] @ (layer**2 @ weights[number + 1]))
        nodes = self.output.shape[0]
        sums.append(weights[-1] @ jnp.sum(self.output.reshape(nodes, -1) ** 2, axis=1))
        return jnp.stack(sums)
