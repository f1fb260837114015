from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_prep.worker_pool import worker_pool


def test_workers_leave_ctrl_c_to_their_parent_and_end_in_the_midst_of_their_work():
    with worker_pool(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        (worker,) = pool._processes
        pool.submit(time.sleep, 600)
    assert not Path(f"/proc/{worker}").exists()


PARENT = """
import os, time
from data_prep.worker_pool import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    words = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 30
    while _lives(worker):
        assert time.monotonic() < end
        time.sleep(0.005)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
