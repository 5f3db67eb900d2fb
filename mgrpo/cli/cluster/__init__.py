"""`mgrpo launch`: one TOML on many machines.

plan.py      which parts there are, where each runs, what it listens at, what it needs
slurm.py     a batch script a part, and submit.sh
compose.py   one compose.json for containers on one machine
k8s.py       one k8s.json
command.py   the command line: checks, the folder, --dry-run, --submit
follow.py    `mgrpo monitor`: what `mgrpo train` shows and writes, for parts that somebody else started
"""
