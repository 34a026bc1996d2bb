"""What the theory of wide inputs asks of an activation: `E s s`, `E s' s'`, `E s'' s` and `E s' s' s s`."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Entries = Float[Array, "..."]
Covariance = Any
"""Covariance of a few Gaussian fields: `C[i][j]` is the entry for fields `i` and `j`, counted from zero. Entries are
arrays that broadcast against one another, so that one call serves a whole table of units."""


class AbstractActivation(eqx.Module):
    """An activation `s` and its expectations over centred Gaussian fields `x` of covariance `C`.

        i2 = E s(x0) s(x1)      j2 = E s'(x0) s'(x1)      k2 = E s''(x0) s(x1)
        i3 = E s'(x0) x1 s(x2)      i4 = E s'(x0) s'(x1) s(x2) s(x3)

    Integration by parts reduces `i3` to the functions of two fields: `i3 = C01 k2(x0, x2) + C12 j2(x0, x2)`.
    Covariances may be singular; coincident fields are allowed.
    """

    @abc.abstractmethod
    def __call__(self, x: Entries) -> Entries:
        """The activation itself, elementwise."""

    def derivative(self, x: Entries) -> Entries:
        """`s'(x)`, elementwise."""
        return jax.jvp(self.__call__, (x,), (jnp.ones_like(x),))[1]

    @abc.abstractmethod
    def i2(self, C: Covariance) -> Entries:
        """`E s(x0) s(x1)`."""

    @abc.abstractmethod
    def j2(self, C: Covariance) -> Entries:
        """`E s'(x0) s'(x1)`."""

    @abc.abstractmethod
    def k2(self, C: Covariance) -> Entries:
        """`E s''(x0) s(x1)`, with the derivative in the sense of distributions."""

    def i3(self, C: Covariance) -> Entries:
        """`E s'(x0) x1 s(x2)`."""
        outer = ((C[0][0], C[0][2]), (C[0][2], C[2][2]))
        return C[0][1] * self.k2(outer) + C[1][2] * self.j2(outer)

    @abc.abstractmethod
    def i4(self, C: Covariance) -> Entries:
        """`E s'(x0) s'(x1) s(x2) s(x3)`."""
