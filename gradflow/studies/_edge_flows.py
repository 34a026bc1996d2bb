"""The rules and the flows of the study of the edge of stability, and where each flow stops being valid."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gradflow._solution import Status
from gradflow.flows import (
    CentralFlow,
    DescentAscentFlow,
    EdgeFlow,
    GradientFlow,
    ModifiedFlow,
    MomentumDescentAscentFlow,
    MomentumFlow,
    PrincipalFlow,
    RodFlow,
)
from gradflow.observables import Loss, MeanLoss
from gradflow.rules import AbstractRule, GradientDescent, HeavyBall, Nesterov, RMSProp, ScalarRMSProp

WARM_UP = 20
"""Steps of a rule before a flow that starts from what the rule has become: its ringing over, its memory filled."""
DECAY = 0.95
"""Of the memory of the RMSProp rules."""
LONG_DELAY = 20.0
"""Steps by which an oscillation may set in late before the central flow counts as ahead of the rule."""
KINKED = 25
"""Times as many steps as on smooth problems are allowed where there are kinks."""
CLOSE = 0.99
"""Share of a limit from which it counts as reached."""

RULES: dict[str, Callable[[Any, Any, float], AbstractRule]] = {
    "gradient_descent": lambda problem, rate, momentum: GradientDescent(problem, rate),
    "heavy_ball": lambda problem, rate, momentum: HeavyBall(problem, rate, momentum=momentum),
    "nesterov": lambda problem, rate, momentum: Nesterov(problem, rate, momentum=momentum),
    "scalar_rmsprop": lambda problem, rate, momentum: ScalarRMSProp(problem, rate, decay=DECAY),
    "rmsprop": lambda problem, rate, momentum: RMSProp(problem, rate, decay=DECAY),
}
ADAPTIVE = (ScalarRMSProp, RMSProp)


class Case(NamedTuple):
    """A flow beside a rule: how it is built, what mean loss it predicts, and the limits of its validity.

    `limit` is the share of the stability threshold that its largest sharpness may reach, `second` that of the
    second-largest; `None` where there is no such limit. `remembers`: whether it starts from the memory of the rule.
    `patience`: attempted steps, over those of the rule, after which a run is given up; kinks take more of them.
    `expands`: whether the flow is an expansion, which kinks spoil.
    """

    build: Callable[[Any, Any], Any]
    loss: Callable[[Any], Any] = Loss
    limit: float | None = None
    second: float | None = None
    remembers: bool = False
    patience: int = 4
    expands: bool = True


def _mean_loss(problem: Any) -> Any:
    return MeanLoss()


def _momentum(kind: Any, **options: Any) -> Callable[[Any, Any], Any]:
    def build(rule: Any, memory: Any) -> Any:
        return kind(rule.problem, rule.learning_rate, rule.momentum, nesterov=isinstance(rule, Nesterov), **options)

    return build


def _order(order: int) -> Callable[[Any, Any], Any]:
    return lambda rule, memory: DescentAscentFlow(rule.problem, rule.learning_rate, order=order)


def _central(rule: Any, memory: Any) -> Any:
    return CentralFlow(rule, second_moment=memory)


GRADIENT_FLOW = Case(lambda rule, memory: GradientFlow(rule.problem), limit=1.0, expands=False)
OF_DESCENT: dict[str, Case] = {
    "gradient flow": GRADIENT_FLOW,
    "modified": Case(lambda rule, memory: ModifiedFlow(rule.problem, rule.learning_rate, order=2), limit=1.0),
    # Its field is singular at `eta lambda = 1`, half of the threshold.
    "principal": Case(lambda rule, memory: PrincipalFlow(rule.problem, rule.learning_rate), limit=0.5, patience=1),
    "rod": Case(lambda rule, memory: RodFlow(rule.problem, rule.learning_rate), _mean_loss, second=1.0),
    "edge": Case(lambda rule, memory: EdgeFlow(rule.problem, rule.learning_rate), _mean_loss, second=1.0),
    "descent-ascent 1": Case(_order(1), _mean_loss),
    "descent-ascent 2": Case(_order(2), _mean_loss),
    "descent-ascent 3": Case(_order(3), _mean_loss),
    "central": Case(_central, _mean_loss),
}
OF_MOMENTUM: dict[str, Case] = {
    "gradient flow": GRADIENT_FLOW,
    "modified": Case(_momentum(ModifiedFlow, order=2), limit=1.0),
    "momentum": Case(_momentum(MomentumFlow), limit=1.0),
    "momentum descent-ascent": Case(_momentum(MomentumDescentAscentFlow, warm_up=WARM_UP), _mean_loss),
}
OF_MEMORY: dict[str, Case] = {"central": Case(_central, _mean_loss, remembers=True)}
FLOWS: dict[str, dict[str, Case]] = {
    "gradient_descent": OF_DESCENT,
    "heavy_ball": OF_MOMENTUM,
    "nesterov": OF_MOMENTUM,
    "scalar_rmsprop": OF_MEMORY,
    "rmsprop": OF_MEMORY,
}

REASONS = {
    "valid": "nothing that the theory of this flow excludes has happened",
    "edge": "its sharpness reaches the stability threshold, beyond which the rule no longer follows it",
    "half": "learning rate times its sharpness reaches 1, where its field is singular",
    "second": "a second eigenvalue of its Hessian reaches the threshold, and it holds one direction",
    "delay": "the oscillation of the rule starts late, from a small seed, and this flow is ahead of it meanwhile",
    "kinks": "the problem has kinks, across which its expansion does not hold",
    "refused_kinks": "refused to start: the problem has kinks",
    "refused_start": "refused to start: the sharpness at the start is above the threshold",
    "failed": "the run did not reach its end",
}


def stops_being_valid(
    case: Case,
    ks: np.ndarray,
    eigenvalues: Float[np.ndarray, "rows 2"],
    threshold: float,
    status: int,
    delay: float,
    kinks: bool,
) -> tuple[float, str]:
    """The step from which on a flow is not to be relied on, and why; infinity where nothing speaks against it.

    `eigenvalues` are the two largest along the flow, `delay` counts steps.
    """
    if kinks and case.expands:
        return 0.0, "kinks"
    ends = [(np.inf, "valid")]
    relative = eigenvalues / threshold
    finite = np.isfinite(relative[:, 0])
    limits = ((0, case.limit, "edge" if case.limit == 1.0 else "half"), (1, case.second, "second"))
    for column, limit, reason in limits:
        if limit is not None:
            beyond = finite & (relative[:, column] >= CLOSE * limit)
            ends += [(float(ks[np.argmax(beyond)]), reason)] if beyond.any() else []
    if delay > LONG_DELAY:
        at_edge = finite & (relative[:, 0] >= CLOSE)
        ends.append((float(ks[np.argmax(at_edge)]) if at_edge.any() else 0.0, "delay"))
    if status > Status.STOPPED:
        ends.append((float(ks[finite][-1]) if finite.any() else 0.0, "failed"))
    return min(ends)
