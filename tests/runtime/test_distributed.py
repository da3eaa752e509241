"""A plan run by several processes over gloo: the same numbers as in one process, and errors that name the rank that failed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = str(Path(__file__).parent / "rank.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
ENVIRONMENT = {**CLEAN, "OMP_NUM_THREADS": "1"}


def torchrun(n_ranks, folder):
    """What each rank of the exact cases wrote."""
    command = [*TORCHRUN, f"--nproc-per-node={n_ranks}", SCRIPT, "exact", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(n_ranks)]


def test_two_ranks_compute_what_one_process_computes(tmp_path):
    """Tied weights, and a compressed GPT-2: losses, gradients and updated weights bit for bit those of the local pipe."""
    found = torchrun(2, tmp_path)
    for rank in found:
        assert rank["tied"]["unlike_local"] == []
        assert rank["tied"]["from_eager"] < 1e-5
        assert rank["gpt"]["unlike_local"] == []
        assert rank["gpt"]["from_eager"] < 0.2  # compressed
        assert rank["mismatch"] == (
            "OptionError: the plan is for 3 ranks, but 2 were started; "
            "use torchrun --nproc-per-node 3, or compile with n_ranks=2"
        )
        assert rank["data"].startswith("InputError: ranks [1] were given other inputs than rank 0 in the first step")
        assert rank["memory"]["8"] == rank["memory"]["32"] <= 6  # messages alive at once, by the number of microbatches
        assert rank["memory"]["left 8"] == rank["memory"]["left 32"] == 0
    assert set(found[0]["tied"]["parameters"]) & set(found[1]["tied"]["parameters"]) == {"embed.weight"}


def test_four_ranks_compute_what_one_process_computes(tmp_path):
    """Long skips, BatchNorm buffers and tied weights; every rank's model is whole in the end."""
    found = torchrun(4, tmp_path)
    for rank in found:
        replicated = rank.pop("replicated")
        assert {name: found["unlike_local"] for name, found in rank.items()} == {"unet": [], "cnn": [], "tied": []}
        assert max(found["from_eager"] for found in rank.values()) < 1e-5
        assert rank["unet"]["messages"] > 1
        for case in replicated.values():
            assert case["losses"][0][0] == case["losses"][0][1]
            assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in case["losses"])
            assert max(*case["gradients"], case["whole"]) < 1e-5
        rank["replicated"] = replicated
    assert [rank["replicated"]["tied (2, 2)"]["replica"] for rank in found] == [0, 1, 0, 1]
    assert_replicas_agree([rank["replicated"] for rank in found])
    assert [rank["replicated"]["gpt (2, 1, 1)"]["ran"] for rank in found[:2]] == [
        ["0F0", "0F2", "0F4", "0F6"],
        ["0F1", "0F3", "0F5", "0F7"],
    ]


def assert_replicas_agree(found):
    """Every rank that has a parameter has the same bits, and some parameters are on several ranks."""
    for name in found[0]:
        digests = [rank[name]["digests"] for rank in found]
        for parameter in {p for d in digests for p in d}:
            assert len({d[parameter] for d in digests if parameter in d}) == 1, (name, parameter)
        assert sum(map(len, digests)) > len({p for d in digests for p in d})


def test_the_rank_that_fails_is_named_by_all_others(tmp_path):
    """It dies, raises, hangs or never comes; none of the others waits for longer than the timeout. See ``rank.py``."""
    subprocess.run([sys.executable, SCRIPT, "failures", str(tmp_path)], env=ENVIRONMENT, timeout=240, check=True)
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}

    def others(case, n_ranks):
        return {r: found[f"{case}-{r}"] for r in range(n_ranks) if r != 1}

    for case, n_ranks, timeout in (("kill", 3, 60), ("kill-of-4", 4, 60), ("raise", 3, 60), ("hang", 3, 3)):
        for rank, answer in others(case, n_ranks).items():
            assert answer["message"].startswith(f"RuntimeFailure: rank {rank} could not ")
            assert (
                f": rank 1 failed, died or did not answer within {timeout} s (timeout_seconds); look"
                in answer["message"]
            )
            assert answer["seconds"] < 20
            assert (tmp_path / f"{case}-{rank}.err").read_text() == ""
    assert {"kill-1", "kill-of-4-1", "hang-1"}.isdisjoint(found)
    assert found["raise-1"]["message"] == "ValueError: no more"
    assert all(
        re.search(r"\(Timed out waiting 3000ms for \w+ operation to complete\)$", a["message"])
        for a in others("hang", 3).values()
    )
    for rank, answer in others("absent", 3).items():
        assert answer["message"].startswith(
            f"RuntimeFailure: rank {rank} of 3 could not connect to all others within 3 s (timeout_seconds); "
            "look for a rank that did not start or stopped ("
        )


def test_torchrun_ends_when_a_rank_dies_and_names_it(tmp_path):
    begin = time.monotonic()
    command = [*TORCHRUN, "--nproc-per-node=2", SCRIPT, "failing", str(tmp_path), "kill"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"exitcode  : -{signal.SIGKILL.value}" in done.stderr
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert time.monotonic() - begin < 100
