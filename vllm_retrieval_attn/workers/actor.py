# SPDX-License-Identifier: Apache-2.0
"""What a Ray actor does (workers/supervisor.py): maps the arena and searches one share of the KV heads.

No call of Ray is made while it serves.
"""

import os

from threadpoolctl import ThreadpoolController

from vllm_retrieval_attn.index.elsewhere import check_readable
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.desk import Desk
from vllm_retrieval_attn.workers.grower import Grower
from vllm_retrieval_attn.workers.indexes import Indexes
from vllm_retrieval_attn.workers.lane import LEADER, Lane
from vllm_retrieval_attn.workers.prober import Prober
from vllm_retrieval_attn.workers.supervisor import ActorSetup


class SearchActor:
    """Serves the KV heads ``h`` with ``h % layout.actors == actor``."""

    def __init__(self, setup: ActorSetup, actor: int) -> None:
        os.sched_setaffinity(0, setup.cpus)
        layout = setup.layout
        for library in ThreadpoolController().select(internal_api="openblas").lib_controllers:
            library.set_num_threads(1)  # matrices here are small and threads many
        self._file = SharedFile.attach(setup.path)
        views = self._views = Views(layout, self._file.map)
        indexes = Indexes(layout, views, actor, setup.by_faiss)
        check_readable(indexes.source)
        desk = Desk(layout, views, indexes, setup.scale, setup.candidates)
        self._lanes = [Lane(layout, views, desk, actor, t, setup.spin_ns) for t in (LEADER, *range(layout.threads))]
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            lane.ready.wait()  # the first start on a machine compiles for a minute
            if lane.error is not None:
                raise lane.error
        if layout.indexed:
            self._growers = [Grower(layout, views, indexes, t, layout.threads) for t in range(layout.threads)]
            for grower in self._growers:
                grower.start()
            self._prober = Prober(layout, views, indexes, actor, setup.scale)
            self._prober.start()
        # Last, since the client takes the process for attached from here on.
        views.words[views.actor_word(actor)] = os.getpid()
