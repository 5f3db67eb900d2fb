"""SLURM: a batch script a part, submit.sh that hands them in in order, stop.sh that ends what serves for ever."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgrpo.cli.cluster.plan import MONITOR, Part, Plan

TRIES = 5  # starts of a part before its job fails; status 2 is a mistake in the config and ends it at once
GRACE_S = 30  # between the end of the run and the end of its store


def scripts(plan: Plan, options: Sequence[str]) -> Mapping[str, str]:
    """Name -> text of every file. options: further sbatch options, "--partition=gpu"."""
    root = plan.site.root
    # Before the time limit a trainer writes a checkpoint and leaves.
    warning = math.ceil(plan.config.trainer.stop_timeout)
    texts = {f"{part.name}.sh": _part(part, root, options, warning) for part in plan.parts}
    texts["stop.sh"] = f'{_header("stop", root, 1, options)}\n\nsleep {GRACE_S}\nscancel "$@"\n'
    return texts | {"submit.sh": _submit(plan)}


def _header(name: str, root: Path, cpus: int, options: Sequence[str]) -> str:
    lines = [
        f"--job-name=mgrpo-{name}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={cpus}",
        f"--output={shlex.quote(str(root / 'logs' / name))}-%j.log",
    ]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in [*lines, *options])])


def _part(part: Part, root: Path, options: Sequence[str], warning: int) -> str:
    own = [f"--nodelist={part.host}", f"--signal=TERM@{warning}"]
    own += [f"--gpus-per-task={part.gpus}"] if part.gpus else []
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in part.environment.items())
    return f"""{_header(part.name, root, part.cpus, [*own, *options])}

cd {shlex.quote(str(Path.cwd()))} || exit 1
{exports}for try in {" ".join(map(str, range(1, TRIES + 1)))}; do
    srun {shlex.join(part.command)}
    status=$?
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then break; fi
    echo "{part.name} ended with status $status (start $try of {TRIES})" >&2
    sleep 5
done
exit "$status"
"""


def _submit(plan: Plan) -> str:
    lines = [_dependent(part) for part in plan.parts]
    endless = " ".join(f'"${{job[{part.name}]}}"' for part in plan.parts if part.serves_for_ever)
    lines.append(f'submit stop "afterany:${{job[{MONITOR}]}}" {endless}')
    return f"""#!/bin/bash
# Hands in the jobs of a run, each after those it needs. Run it again to go on with a run that was ended.
set -euo pipefail
cd "$(dirname "$0")"
declare -A job=()
trap '[ $? -eq 0 ] || {{ echo "submit.sh: those before are cancelled" >&2; scancel "${{job[@]}}"; }}' EXIT

submit() {{ # NAME DEPENDENCY ARGUMENT...
    local name=$1 dependency=$2 id
    shift 2
    id=$(sbatch --parsable ${{dependency:+"--dependency=$dependency"}} "$name.sh" "$@")
    job[$name]=${{id%%;*}}
    echo "$name: job ${{job[$name]}}"
}}

{chr(10).join(lines)}
echo "to end the run: scancel ${{job[*]}}"
"""


def _dependent(part: Part) -> str:
    after = ":".join(f"${{job[{name}]}}" for name in part.after)
    return f'submit {part.name} "{f"after:{after}" if after else ""}"'
