"""What every trajectory of a step is worth, for a trainer that is not ours: groups, the draw to D_max, votes and
advantages in one call on flat columns, one row a trajectory.

    loss = 1/D  sum_j w_j  n_j  sum_t term_t(A_j)        D = sum w,      n_j = 1 / |o_j|  (mean of sequences), or
                                                         D = sum w |o|,  n_j = 1          (mean of tokens)

w_j is the alignment's weight of row j (its vote), A_j its advantage in its (query, role) group, |o_j| its trained
tokens: the numbers that a run of mgrpo trains with, bit for bit in float64 where the groups come in the run's order.

A trainer that knows no weights can carry the votes in the advantages (`fold`):

    "sequence-mean"   host = 1/n sum_j 1/|o_j| sum_t term_t(A'_j)         A' = A w n / sum w
    "token-mean"      host = 1/sum |o| sum_j sum_t term_t(A'_j)           A' = A w sum |o| / sum w |o|

The host's loss is then the weighted one exactly, because the policy term is homogeneous: term(c A) = c term(A) for
c >= 0. That is so for every built-in type: grpo, bnpo, dapo, dr_grpo (under "sequence-mean" the host divides by n x
max_completion_length), gspo, cispo, and sapo, whose temperature looks at the sign of A alone; with delta, corrections
and a dual clip too. It is not so of the KL and the entropy term, which have no advantage in them: there a host counts
every row once, dropped ones as well. A loss of your own has to be homogeneous itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from mgrpo.algorithms.batch import Batch
from mgrpo.algorithms.dr_grpo import DrGrpo
from mgrpo.algorithms.mgrpo import MGrpo
from mgrpo.algorithms.rloo import Rloo
from mgrpo.algorithms.statistics import LARGEST_REWARD, Float64, GroupRelative, Int64, Moments
from mgrpo.alignment import Mode, align, query_name
from mgrpo.config.algorithm import BatchAlgorithm
from mgrpo.config.loss import WITHOUT_DEVIATION
from mgrpo.config.reward import RewardConfig
from mgrpo.types import MAIN

Fold = Literal["sequence-mean", "token-mean"]
ESTIMATORS: dict[str, type[GroupRelative]] = {"grpo": MGrpo, "dr_grpo": DrGrpo, "rloo": Rloo, "batch": Batch}
ROLLOUTS = 1 << 16
"""Rollouts of a group that are taken: numbers beyond it are not those of a group's rollouts."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The n rows in the order they were given."""

    advantage: Float64  # (n,), 0 where the draw dropped the row; with `fold` it carries the vote
    weight: Float64  # (n,) w, all copies together; 0 where the draw dropped the row
    kept: npt.NDArray[np.bool_]  # (n,) weight > 0
    denominator: float  # sum of weight: over the rollouts, those that have a row of the role
    weighted_tokens: float  # sum of weight x tokens; nan without tokens


def assign(
    query: Sequence[str | int],
    role: str | Sequence[str],
    rollout: Sequence[int] | Int64,
    invocation: Sequence[int] | Int64,
    reward: Sequence[float] | Float64,
    *,
    tokens: Sequence[int] | Int64 | None = None,
    d_max: int | Mapping[str, int],
    seed: int,
    step: int,
    mode: Mode = "weights",
    estimator: str = "grpo",
    unbiased: bool = False,
    eps: float = 1e-6,
    group_size: int | None = None,
    fold: Fold | None = None,
) -> Assigned:
    """Advantages and votes of the n trajectories of one optimizer step, in any order.

    query (n,): which asking of a question. role: of all rows, or of each (n,). rollout (n,) in [0, group_size).
    invocation (n,): 0..d_k - 1 of the role in its rollout; a rollout with d_k = 0 has no row, and then no part in its
    group. reward (n,): the row's own. tokens (n,): its trained tokens, needed by fold="token-mean". d_max: trajectories
    that each rollout contributes, of all roles or of each; of "main" 1. seed, step, mode: as mgrpo.align; on every rank
    and after a restart the same ones. estimator, unbiased, eps: as mgrpo.group_advantage, "batch" over the role's rows
    of this call. group_size: K; without it groups may differ in size. fold: see the module. No rows: empty arrays and
    denominator 0.

    Raises ValueError or TypeError naming row, query, role, rollout and what is wrong: columns that differ in length,
    an empty role, negative numbers, a rollout beyond group_size, a group of "main" without a row for each of group_size
    rollouts, a row that comes twice, invocations that are not 0..d_k - 1, a reward that is not finite, a role without
    d_max, and with `fold` a row without trained tokens.
    """
    _check_settings(estimator, unbiased, eps, group_size, fold)
    rows = _Rows(query, role, rollout, invocation, reward, tokens)
    if fold == "token-mean" and rows.tokens is None:
        raise ValueError("tokens: missing, and fold='token-mean' needs them")
    rows.check_values(fold)
    bounds = {name: _bound(d_max, name) for name in rows.roles}
    rows.check_groups(group_size)
    weight = rows.weights(bounds, seed, step, mode)
    advantage = rows.advantages(weight, estimator, eps, unbiased)
    denominator = float(weight.sum())
    weighted = float("nan") if rows.tokens is None else float((weight * rows.tokens).sum())
    if fold == "sequence-mean" and len(weight):
        advantage = advantage * weight * (len(weight) / denominator)
    elif fold == "token-mean" and len(weight):
        assert rows.tokens is not None
        advantage = advantage * weight * (float(rows.tokens.sum()) / weighted)
    return Assigned(advantage, weight, weight > 0, denominator, weighted)


def _check_settings(
    estimator: str, unbiased: bool, eps: float, group_size: int | None, fold: str | None
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if unbiased and estimator in WITHOUT_DEVIATION:
        raise ValueError(f"unbiased: True has no effect with estimator {estimator!r}, which has no deviation")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is below 0")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size: {group_size} is below 1")
    if fold is not None and fold not in get_args(Fold):
        raise ValueError(f"fold: {fold!r} is not one of {', '.join(get_args(Fold))}")


def _bound(d_max: int | Mapping[str, int], role: str) -> int:
    """D_max of a role. TypeError for one that is no integer."""
    if not isinstance(d_max, Mapping):
        return 1 if role == MAIN else index(d_max)
    if role == MAIN and d_max.get(MAIN, 1) != 1:
        raise ValueError(f"d_max: {d_max[MAIN]} for role {MAIN!r}, which has one trajectory a rollout")
    if role != MAIN and role not in d_max:
        raise ValueError(
            f"d_max: no number for role {role!r}, only for {', '.join(map(repr, d_max)) or 'none'}"
        )
    return 1 if role == MAIN else index(d_max[role])


def _values(column: Any, name: str) -> list[Any]:
    """A column of names as plain Python; of numpy, torch or Python."""
    if isinstance(column, (str, bytes)):
        raise TypeError(f"{name}: {column!r} is one name, expected one for each row")
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _query_names(column: Any) -> list[str]:
    return [
        query_name(int(value) if isinstance(value, np.integer) else value)
        for value in _values(column, "query")
    ]


def _role_names(column: Any, n: int) -> list[str]:
    """One role for each row, given one for all or one for each. TypeError for a row without one."""
    names = [column] * n if isinstance(column, str) else _values(column, "role")
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"role: {name!r} in row {row} is a {type(name).__name__}, expected str")
    return names


def _integers(column: Any, name: str) -> Int64:
    array = np.asarray(column)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: {array.dtype} is no type of integers")
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}, expected (n,)")
    return array.astype(np.int64)


def _numbers(names: list[str]) -> tuple[Int64, list[str]]:
    """Each name as its place among the distinct ones, in order of first appearance; and those."""
    known: dict[str, int] = {}
    places = [known.setdefault(name, len(known)) for name in names]
    return np.array(places, np.int64), list(known)


class _Rows:
    """The columns, checked, and the order in which groups are worked on: roles, then queries as they first appear, then
    rollout and invocation, so that the order of rows changes nothing but whose group is first."""

    def __init__(
        self, query: Any, role: Any, rollout: Any, invocation: Any, reward: Any, tokens: Any
    ) -> None:
        names = _query_names(query)
        n = len(names)
        role_names = _role_names(role, n)
        self.rollout, self.invocation = _integers(rollout, "rollout"), _integers(invocation, "invocation")
        self.reward = np.asarray(reward, np.float64)
        self.tokens = None if tokens is None else _integers(tokens, "tokens")
        columns: dict[str, Any] = {"role": role_names, "rollout": self.rollout, "invocation": self.invocation}
        columns |= {"reward": self.reward, "tokens": range(n) if self.tokens is None else self.tokens}
        for name, column in columns.items():
            if len(column) != n:
                raise ValueError(f"{name}: {len(column)} rows, where query has {n}")
        if self.reward.ndim != 1:
            raise ValueError(f"reward: shape {self.reward.shape}, expected ({n},)")
        self.query, self.queries = _numbers(names)
        self.role, self.roles = _numbers(role_names)
        if "" in self.roles:
            self._refuse(int(np.argmax(self.role == self.roles.index(""))), "the role is empty")
        self.group = self.role * max(len(self.queries), 1) + self.query
        self.order = np.lexsort((self.invocation, self.rollout, self.group))

    def _refuse(self, row: int, why: str) -> NoReturn:
        query, role = self.queries[self.query[row]], self.roles[self.role[row]]
        raise ValueError(f"row {row}: query {query!r}, role {role!r}, rollout {self.rollout[row]}: {why}")

    def _refuse_first(self, wrong: npt.NDArray[np.bool_], why: str, column: Any) -> None:
        """Refuse the first row that is wrong, if one is. why: a text with a place for the row's value in `column`."""
        if wrong.any():
            row = int(np.argmax(wrong))
            self._refuse(row, why.format(column[row]))

    def check_values(self, fold: str | None) -> None:
        """Each row for itself."""
        self._refuse_first(self.rollout < 0, "the rollout is below 0", self.rollout)
        beyond = f"the rollout is beyond {ROLLOUTS - 1}: rollouts count from 0 in each group"
        self._refuse_first(self.rollout >= ROLLOUTS, beyond, self.rollout)
        self._refuse_first(self.invocation < 0, "invocation {} is below 0", self.invocation)
        self._refuse_first(~np.isfinite(self.reward), "reward {} is not finite", self.reward)
        unfit = ~(np.abs(self.reward) <= LARGEST_REWARD)
        self._refuse_first(unfit, f"reward {{}} is not within +-{LARGEST_REWARD:g}", self.reward)
        if self.tokens is not None:
            self._refuse_first(self.tokens < 0, "{} trained tokens, below 0", self.tokens)
            idle = (self.tokens == 0) & (fold is not None)
            self._refuse_first(idle, f"no trained token, and fold={fold!r} has no mean of it", self.tokens)

    def check_groups(self, group_size: int | None) -> None:
        """Each row among the others of its group."""
        order = self.order
        group, rollout, invocation = self.group[order], self.rollout[order], self.invocation[order]
        new = np.ones(len(order), bool)
        new[1:] = (group[1:] != group[:-1]) | (rollout[1:] != rollout[:-1])
        twice = np.flatnonzero(~new[1:] & (invocation[1:] == invocation[:-1]))
        if twice.size:
            first, again = order[twice[0]], order[twice[0] + 1]
            self._refuse(int(again), f"invocation {self.invocation[again]} stands in row {first} already")
        place = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        gaps = np.flatnonzero(invocation != place)
        if gaps.size:
            row, missing = int(order[gaps[0]]), place[gaps[0]]
            self._refuse(row, f"invocation {self.invocation[row]} without an invocation {missing}")
        main = np.array([name == MAIN for name in self.roles], bool)[self.role] if len(order) else order > 0
        many = main & (self.invocation > 0)
        self._refuse_first(many, "invocation {}, and this role has one trajectory a rollout", self.invocation)
        if group_size is not None:
            beyond = self.rollout >= group_size
            self._refuse_first(beyond, f"the rollout is beyond group_size, {group_size}", self.rollout)
            self._check_complete(main, group_size)

    def _check_complete(self, main: npt.NDArray[np.bool_], group_size: int) -> None:
        """Every rollout has its row of "main", where the call has rows of that role. (That a rollout has no row of
        another role says only that it did not call it.)"""
        if not main.any():
            return
        rollouts = np.bincount(self.query[main], minlength=len(self.queries))
        short = (rollouts != group_size)[self.query]
        why = f"{{}} rollouts have a row of role {MAIN!r}, expected group_size, {group_size}"
        self._refuse_first(short, why, rollouts[self.query])

    def weights(self, bounds: Mapping[str, int], seed: int, step: int, mode: Mode) -> Float64:
        """(n,) weights of the alignment, group by group."""
        out = np.zeros(len(self.order))
        starts = np.flatnonzero(np.diff(self.group[self.order]))
        for rows in np.split(self.order, starts + 1) if len(out) else ():
            rollout = self.rollout[rows]
            # Rollouts without a row change no other rollout's draw, so only those that have one take a place here.
            counts = np.bincount(rollout)
            role = self.roles[self.role[rows[0]]]
            aligned = align(
                counts.tolist(), d_max=bounds[role], seed=seed, step=step, query=self.queries[self.query[rows[0]]],
                role=role, mode=mode,
            )  # fmt: skip
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            out[rows[first[aligned.rollout] + aligned.invocation]] = aligned.weight
        return out

    def advantages(self, weight: Float64, estimator: str, eps: float, unbiased: bool) -> Float64:
        """(n,) advantages, role by role; 0 in rows without weight."""
        out = np.zeros(len(self.order))
        for number, role in enumerate(self.roles):
            rows = self.order[(self.role[self.order] == number) & (weight[self.order] > 0)]
            _, group = np.unique(self.group[rows], return_inverse=True)
            kind = ESTIMATORS[estimator](BatchAlgorithm.model_construct(eps=eps), role, RewardConfig())
            moments = Moments(self.reward[rows], weight[rows], group, int(group.max()) + 1, unbiased)
            out[rows] = kind.rows(moments)
        return out
