"""The task "factbook-small": the factbook's questions for policies that learn to read from nothing.

A closed view of the world of the task "factbook": every name and value is one word, every section of an entry one
document of up to 90 words. It is the task "atlas" (words/) with more to choose from: six documents an entity, the
section that tells a relation to be known, search results that share the entity or the section or only mention it, and
documents in which the asked field is one of up to 40.

    view      the words, the facts and the documents
    search    what a search finds
    task      all of it behind the interface of a Task, and what a comparison on it must show
"""
