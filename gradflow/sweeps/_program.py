"""One member of a sweep as the driver sees it: a start, one attempt after another, a result. Flows and rules alike."""

import equinox as eqx
import jax
from jaxtyping import Array, Int, PyTree

from gradflow._solution import Solution, moving
from gradflow._tree import Extents
from gradflow.runs._member import AbstractMember, Options
from gradflow.runs._run import AbstractRun, ErrorCounts


class Padding(eqx.Module):
    """The sizes of a padded member."""

    widths: Extents  # of its parameters
    extents: Extents  # of its state
    counts: ErrorCounts


class PerMember(eqx.Module):
    """What a member has of its own; a batch of them has one more leading axis."""

    member: PyTree  # its arrays, where they differ between members
    iterates: Int[Array, "*batch rows"] | None = None  # those of a rule that are saved
    padding: Padding | None = None


class Program(eqx.Module):
    """A member made ready to run. Exists while the driver is traced."""

    run: AbstractRun
    per_member: PerMember
    max_steps: Array

    def begin(self) -> PyTree:
        return self.run.begin()

    def attempt(self, carry: PyTree) -> PyTree:
        """One attempted step."""
        return self.run.attempt(carry, self.max_steps)

    def result(self, carry: PyTree) -> Solution:
        """The solution with the saved parameters that flow, zeros in rows not reached, and without the last ones."""
        solution = self.run.summarise(carry)
        parts = lambda s: (s.params, s.final, s.state, s.checkpoint)  # noqa: E731
        flowing = moving(solution.params, solution.held)
        return eqx.tree_at(parts, solution, (flowing, None, None, None), is_leaf=lambda x: x is None)

    def evaluation(self) -> PyTree:
        return self.run.evaluation()


def make_program(per_member: PerMember, shared: PyTree, options: Options) -> Program:
    """The program of a member, from its own part and that which it shares with the others of its group."""
    member: AbstractMember = eqx.combine(per_member.member, shared)
    run = member.run(options, per_member.iterates)
    if per_member.padding is not None:
        run = run.padded(per_member.padding.widths, per_member.padding.extents, per_member.padding.counts)
    return Program(run, per_member, options.max_steps)


def at(tree: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """The entry of every leaf at an index of its leading axis."""
    return jax.tree_util.tree_map(lambda leaf: leaf[index], tree)
