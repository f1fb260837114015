"""What torch itself noted of the collectives of this process, where its flight recorder runs."""

from __future__ import annotations

import json

import torch


def last_entry() -> str:
    """The newest entry of torch's flight recorder as words, such as `gloo:all_to_all 12 of group ep`; or empty.

    It knows collectives that go around parallel/collectives.py too. Torch 2.13 records gloo without being asked, but
    learns there neither when a collective began nor when it was done; NCCL has a recorder of its own.
    TORCH_FR_BUFFER_SIZE sets how many entries are kept; 0 switches it off.
    """
    module = getattr(torch._C, "_distributed_c10d", None)
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(module, name, None)
        entries = json.loads(dump()).get("entries", []) if dump is not None else []
        if entries:
            last = entries[-1]
            return f"{last['profiling_name']} {last['collective_seq_id']} of group {last['process_group'][-1]}"
    return ""
