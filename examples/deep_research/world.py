"""Build the offline world, check all of it and print its figures: python examples/deep_research/world.py

Both sets of names, both modes: pages and questions by split, the best constant answer, one search, random search, and
how many gold paths the agents' own tools can walk (all of them, which takes about two minutes; --every N: each Nth).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.tasks.factbook.chains import HOPS
from mgrpo.tasks.factbook.check import best_constant, one_search, walk
from mgrpo.tasks.factbook.corpora import Mode, default_folder, open_corpus, world_tools
from mgrpo.tasks.factbook.world import World
from mgrpo.tools.toolset import ToolSet


def describe(world: World, folder: Path, every: int) -> list[str]:
    """The lines to print. Raises ConfigError where the corpus cannot be written."""
    corpus = open_corpus(world, "search", folder)
    lines = [f"  {len(world.pages)} pages, {corpus.passages} passages, digest {world.digest}"]
    for hops in HOPS:
        questions = [q for q in world.questions if q.info["hops"] == hops]
        splits = Counter(str(q.info["split"]) for q in questions)
        some = questions[::every]
        lines += [
            f"  {hops} hops: {len(questions)} questions ({', '.join(f'{s} {n}' for s, n in splits.items())})",
            f"    best constant {best_constant(questions):.3f}, one search {one_search(some, corpus):.3f}, "
            f"random search {one_search(some, corpus, ranked=False):.3f}",
        ]
    corpus.close()
    for mode in ("search", "links"):
        some = list(world.questions)[::every]
        found = asyncio.run(walked(world, mode, folder, some))
        lines.append(f"  gold paths that walk by {mode}: {found} of {len(some)}")
        if found < len(some):
            raise ConfigError("\n".join([*lines, "  some gold paths lead nowhere"]))
    return lines


async def walked(world: World, mode: Mode, folder: Path, questions: Sequence[Question]) -> int:
    """How many questions end at their answer."""
    tools = ToolSet(world_tools(open_corpus(world, mode, folder), mode, "bm25", 5, 4000))
    try:
        return sum([await walk(question, tools) == question.answer for question in questions])
    finally:
        await tools.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="check each Nth question")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="folder of the corpus files")
    given = parser.parse_args()
    try:
        for renamed in (False, True):
            began = time.monotonic()
            world = World.build(renamed)
            for mode in ("search", "links"):
                open_corpus(world, mode, given.cache).close()
            seconds = time.monotonic() - began
            print(f"the world under {'invented' if renamed else 'real'} names, built in {seconds:.1f} s")
            print("\n".join(describe(world, given.cache, max(1, given.every))), flush=True)
    except ConfigError as error:
        print(f"world: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
