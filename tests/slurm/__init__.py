"""Jobs on a real Slurm cluster of many hosts, each host a set of Linux namespaces on this machine.

python -m pytest tests/slurm -m core     what a push runs: `make test-slurm-core`
python -m pytest tests/slurm             all scenarios: `make test-slurm`; with -n 4 they share the cluster

What is real: slurmctld, one slurmd a host, srun, munge; hosts with a name, address, process table and /dev/shm of their
own, a file system that they share, a network that can be unplugged, a power cut that kills every process of a host at
once; `limoe submit`, `limoe job`, `limoe train` as a person starts them. What is not: GPUs and NCCL, cores bound to
tasks, memory limits, a file system whose server is another machine. tests/slurm/cluster tells more.

Every scenario begins with a copy of a run that nobody disturbed, as it stood at some step, and ends with what is in the
run's directory: each line of metrics.jsonl, the last checkpoint and the rows that were read are those of that run.
"""
