"""A version's way from a trainer to its engines, as a stream.

    tensors -> History (one base, patches) -> WeightPublisher | link | Pull -> spools -> Weights -> Engine.load

    layout.py     names, dtypes and slices of a version      patch.py      what changed, exactly
    history.py    the sender's base and patches              publisher.py  the trainer's handlers
    messages.py   what crosses the link                      pull.py       the receiver
    version.py    what an engine is given

Versions are labelled `<role>.e<epoch>.v<version>`: after a rollback the same number may name other weights, and so it
may for another role.
"""
