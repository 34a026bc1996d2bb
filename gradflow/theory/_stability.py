"""The sharpness beyond which a rule is unstable."""

from jaxtyping import Array, Float

from gradflow._checks import fail
from gradflow.protocols import HasUpdateForm, offered


def stability_threshold(rule: object) -> Float[Array, ""]:
    """The sharpness beyond which a rule is unstable on a quadratic.

        gradient descent, RMSProp      2 / eta
        heavy ball                     2 (1 + beta) / eta
        Nesterov                       2 (1 + beta) / ((1 + 2 beta) eta)
        Adam                           2 (1 + b1) / ((1 - b1) eta)

    Beyond it the iterates change sign at every step and grow. On other losses they drive the sharpness there and hold
    it. For rules that divide by the root `D` of a memory of squared gradients (RMSProp, Adam) it is the largest
    eigenvalue of `D^-1 H`, or of the symmetric `D^-1/2 H D^-1/2`, that counts, with `D` as it has become.

    **Arguments**: `rule`: `GradientDescent`, `HeavyBall`, `Nesterov`, `ScalarRMSProp`, `RMSProp`, or an `OptaxRule` of
    `optax.sgd`, `optax.rmsprop` or `optax.adam`, or of `functools.partial` of these with constants by name. A momentum
    coefficient `k/(k + alpha)` counts as its limit, one.

    **Returns** a scalar in the unit of the sharpness, one over time.

    **Raises** `ValueError` for rules of which it is not known, stochastic ones among them.

    Source: J. Cohen et al. (2021), arXiv 2103.00065; with a memory Cohen et al. (2022), arXiv 2207.14484.

    >>> import gradflow as gf
    >>> rule = gf.HeavyBall(lambda w: 0.5 * w**2, 0.125, momentum=0.5)
    >>> float(gf.theory.stability_threshold(rule))
    24.0
    """
    describing = offered(rule, HasUpdateForm)
    form = None if describing is None else describing.form()
    if form is None:
        advice = (
            "Known are GradientDescent, HeavyBall, Nesterov, ScalarRMSProp, RMSProp, and OptaxRule of optax.sgd,"
            " optax.rmsprop or optax.adam itself, or of functools.partial of one of these."
        )
        raise fail(
            "rule",
            "be one whose threshold is known",
            f"a {type(rule).__name__}" if describing is None else describing.described(),
            advice,
        )
    plain = 2 / form.learning_rate
    if form.momentum is None:
        return plain
    beta = form.momentum.astype(plain.dtype)
    return plain * (1 + beta) / {"heavy_ball": 1, "nesterov": 1 + 2 * beta, "average": 1 - beta}[form.averaging]
