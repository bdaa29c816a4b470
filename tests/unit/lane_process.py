# SPDX-License-Identifier: Apache-2.0
"""A program that serves one actor: ``argv[1]`` is the shared file, ``argv[2]`` the layout and the actor's place."""

import json
import sys

from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.desk import Desk
from vllm_retrieval_attn.workers.indexes import Indexes
from vllm_retrieval_attn.workers.lane import LEADER, Lane

if __name__ == "__main__":
    place = json.loads(sys.argv[2])
    layout = Layout(**place["layout"])
    views = Views(layout, SharedFile.attach(sys.argv[1]).map)
    desk = Desk(layout, views, Indexes(layout, views, place["actor"]), place["scale"], 256)
    threads = [Lane(layout, views, desk, place["actor"], thread, place["spin"]) for thread in (LEADER, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
