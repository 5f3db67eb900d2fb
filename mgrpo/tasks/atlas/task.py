"""The embedded default task "atlas": multi-hop questions about countries for a planner and a searcher.

The main agent takes a question apart and delegates single hops; the sub-agent searches, opens documents and
answers. Neither can do without the other: the plan is the main agent's alone, the documents are seen by the
sub-agent alone. In a run of agents.main alone, a tool answers its calls without fail.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.environments.comparison import Claim, Figures
from mgrpo.tasks.atlas.claims import claims
from mgrpo.tasks.atlas.documents import build_documents
from mgrpo.tasks.atlas.facts import World
from mgrpo.tasks.atlas.language import language
from mgrpo.tasks.atlas.questions import QuestionBank
from mgrpo.tasks.words.play import Library
from mgrpo.tasks.words.search import Index
from mgrpo.tasks.words.task import WordsTask


class AtlasTask(WordsTask):
    """See the module's docstring."""

    main_weights = (0.25, 0.375, 0.375)
    sub_weights = (0.25, 0.5, 0.25)

    def make_world(self) -> tuple[Library, QuestionBank]:
        world = World(self.options.facts)
        documents = build_documents(world)
        index = Index(documents.values(), self.options.search)
        library = Library(language(), world, documents, index, self.options.turn_tokens)
        return library, QuestionBank(world)

    def claims(self, figures: Figures) -> Sequence[Claim]:
        return claims(figures)
