"""The methods that /collective_rpc reaches in each worker of a server.

    vllm serve ... --worker-extension-cls mgrpo.engines.vllm.plugin.extension.WorkerExtension

vLLM makes the class a base of its worker's class, so `self` is the worker. All names begin with mgrpo_, since one that
the worker has already is refused. Answers are dicts, errors among them: what a worker raises would end its engine.
"""

from __future__ import annotations

from mgrpo.engines.vllm.plugin import cpu
from mgrpo.engines.vllm.plugin.loading import WeightLoading
from mgrpo.engines.vllm.plugin.receive import DirectReceiving

cpu.keep_plain_weights()  # before the model is loaded: this module is imported when its worker is made


class WorkerExtension(WeightLoading, DirectReceiving):
    """Weights from files (loading.py), and straight from a trainer's ranks (receive.py)."""
