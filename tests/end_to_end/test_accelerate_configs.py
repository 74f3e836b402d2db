"""The files for `accelerate launch` and Slurm: they start the processes that they say, and stop them in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((FOLDER / "accelerate").glob("*.yaml"))

# What each process leaves: a file named by its rank, with what Accelerate makes of it.
RANK = """
import sys, pathlib, torch
torch.set_num_threads(1)
from timm_fsr.training.accelerator import build_accelerator
from timm_fsr.training.recipe import Recipe
folder = pathlib.Path(sys.argv[1])
accelerator = build_accelerator(Recipe(output=str(folder / "run"), channels_last=False))
said = f"{accelerator.process_index} of {accelerator.num_processes}, {accelerator.distributed_type.value}"
(folder / f"{accelerator.process_index}.txt").write_text(f"{said}, {accelerator.device.type}")
accelerator.end_training()
"""


def environment(**more: str) -> dict[str, str]:
    """That of a machine without GPUs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", **more}
    if sys.platform == "linux":
        kept["GLOO_SOCKET_IFNAME"] = "lo"  # by the host's name it may choose an address that does not answer
    return kept


def start(folder: Path, config: str, *flags: str) -> subprocess.Popen[str]:
    """Launch the processes of a configuration file; each leaves a file in `folder`."""
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(FOLDER / "accelerate" / config), *flags, str(script), str(folder)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and what it said on stderr; it does not outlive the test."""
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, errors


def said(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestFiles:
    def test_accelerate_reads_it_and_leaves_what_the_recipe_decides_to_the_recipe(self, path):
        config = load_config_from_file(str(path))
        assert isinstance(config, ClusterConfig)
        assert config.mixed_precision == "no"
        assert config.dynamo_config == {}
        assert config.num_processes % config.num_machines == 0

    def test_it_is_what_its_name_says(self, path):
        config = load_config_from_file(str(path))
        kind, processes, machines = {
            "one_cpu": (DistributedType.NO, 1, 1),
            "one_gpu": (DistributedType.NO, 1, 1),
            "two_cpu_processes": (DistributedType.MULTI_GPU, 2, 1),
            "multi_gpu": (DistributedType.MULTI_GPU, 8, 1),
            "multi_node": (DistributedType.MULTI_GPU, 16, 2),
            "fsdp2": (DistributedType.FSDP, 8, 1),
        }[path.stem]
        assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
        assert config.use_cpu == (path.stem == "one_cpu")


def test_two_cpu_processes_are_two_ranks_of_one_run(tmp_path):
    status, errors = finish(start(tmp_path, "two_cpu_processes.yaml"))
    assert status == 0, errors[-3000:]
    assert said(tmp_path) == ["0 of 2, MULTI_CPU, cpu", "1 of 2, MULTI_CPU, cpu"]


def test_two_launchers_of_multi_node_meet(tmp_path):
    """As on two machines with one process each, both on this one."""
    flags = ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={20000 + os.getpid() % 10000}"]
    launchers = [start(tmp_path, "multi_node.yaml", *flags, f"--machine_rank={rank}") for rank in range(2)]
    for status, errors in [finish(launcher) for launcher in launchers]:
        assert status == 0, errors[-3000:]
    assert said(tmp_path) == ["0 of 2, MULTI_CPU, cpu", "1 of 2, MULTI_CPU, cpu"]


def test_sharding_without_gpus_is_refused_instead_of_left_out(tmp_path):
    status, errors = finish(start(tmp_path, "fsdp2.yaml", "--num_processes=2"))
    assert status != 0
    assert "`accelerate launch` asks for FSDP, but what runs here is MULTI_CPU; use several GPUs" in errors
    assert said(tmp_path) == []


# Stand-ins for Slurm's programs and for the launcher. A file `ready` says that training is under way.
STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >>requeued; fi',
    "srun": 'shift; export SLURM_NODEID=1; echo $$ >step; exec "$@"',
    "scancel": 'echo "$@" >signalled; kill -TERM "$(cat step)"',
    "accelerate": """
        printf "%s\\n" "$@" >arguments
        trap 'sleep 0.2; echo saved >saved; exit 1' TERM
        touch ready
        [ -n "${ENDS:-}" ] && exit "$ENDS"
        for _ in $(seq 600); do sleep 0.05; done
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="Slurm and bash are not there")
class TestSlurm:
    @pytest.fixture
    def job(self, tmp_path: Path) -> list[str]:
        """The command that runs the batch script in an empty folder, with stand-ins first on the path."""
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, body in STANDINS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        return ["bash", str(FOLDER / "slurm.sbatch"), "--config", "a recipe.yaml"]

    def start(self, job: list[str], folder: Path, **more: str) -> subprocess.Popen[bytes]:
        slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = environment(**slurm, SLURM_JOB_ID="12345", PATH=path, **more)
        return subprocess.Popen(job, cwd=folder, env=env)

    def test_a_signal_reaches_the_launcher_which_saves_before_the_job_is_queued_again(self, job, tmp_path):
        process = self.start(job, tmp_path)
        until = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < until, "the launcher was not started"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
        assert (tmp_path / "signalled").read_text() == "--signal=TERM 12345\n"
        assert (tmp_path / "saved").exists()
        assert (tmp_path / "requeued").read_text() == "requeue 12345\n"

    @pytest.mark.parametrize("status", [0, 2])
    def test_a_run_that_ends_by_itself_is_not_queued_again(self, job, tmp_path, status):
        assert self.start(job, tmp_path, ENDS=str(status)).wait(timeout=30) == status
        assert not (tmp_path / "requeued").exists()

    def test_each_launcher_is_told_its_place_and_resumes(self, job, tmp_path):
        self.start(job, tmp_path, ENDS="0").wait(timeout=30)
        arguments = (tmp_path / "arguments").read_text().splitlines()
        assert arguments[arguments.index("--machine_rank") + 1] == "1"
        assert arguments[arguments.index("--num_processes") + 1] == "8"
        assert arguments[arguments.index("--main_process_ip") + 1] == "node1"
        assert arguments[-4:] == ["recipes/train.py", "--config", "a recipe.yaml", "--resume=true"]

    def test_the_launcher_waits_less_than_slurm(self):
        text = (FOLDER / "slurm.sbatch").read_text()
        before_limit, patience = (int(text.split(key)[1].split()[0]) for key in ("TERM@", "SHUTDOWN_TIMEOUT="))
        assert 30 < patience < before_limit
