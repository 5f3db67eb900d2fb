"""The task "factbook-small": see small/__init__.py for what it is, words/task.py for how it is played."""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.environments.comparison import COTRAIN, Claim, Figures
from mgrpo.tasks.factbook.small.search import PageIndex
from mgrpo.tasks.factbook.small.view import RESULTS, language, view_of
from mgrpo.tasks.words.claims import claims
from mgrpo.tasks.words.play import Library
from mgrpo.tasks.words.questions import QuestionBank
from mgrpo.tasks.words.task import WordsTask

HOP_WEIGHTS = (0.0, 0.5, 0.5)
LOWS = {
    (COTRAIN, "sampled"): 0.60,
    (COTRAIN, "greedy"): 0.70,
    ("frozen sub", "sampled"): 0.40,
    ("frozen sub", "greedy"): 0.40,
    ("frozen main", "sampled"): 0.30,
    ("frozen main", "greedy"): 0.30,
}
"""Of what a comparison must show."""


class SmallTask(WordsTask):
    """Options are those of atlas: search, facts, turn_tokens, width."""

    positions = 160
    main_weights = HOP_WEIGHTS
    sub_weights = HOP_WEIGHTS

    def make_world(self) -> tuple[Library, QuestionBank]:
        """ConfigError where the factbook's data are missing."""
        view = view_of(self.options.facts)
        index = PageIndex(view.documents.values(), self.options.search, RESULTS)
        library = Library(language(), view, view.documents, index, self.options.turn_tokens)
        return library, QuestionBank(view.pools, HOP_WEIGHTS)

    def claims(self, figures: Figures) -> Sequence[Claim]:
        return claims(figures, LOWS, pairs=0.30, hops={2: 0.5, 3: 0.5}, permuted=0.60)
