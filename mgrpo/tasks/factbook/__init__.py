"""The offline world: The World Factbook as 2,870 pages, and questions that take several of them to answer.

    data -> names -> facts -> pages       what there is to know, and where it stands
    chains, questions, splits             what is asked: facts that lead from entity to entity
    renaming                              the same world under invented names
    world                                 all of it, built in seconds, the same bit for bit
    source, task                          the world as the questions and the tools of the task "research"
    small                                 a closed view of the world, for policies that learn to read from nothing
    check                                 figures that say how hard the questions are without doing the work

The texts are real. The links between pages are ours: an entity that a border, a trade partner or an independence names
is linked to its first page.
"""
