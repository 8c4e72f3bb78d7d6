"""What is given to engines: valid by their schemas, in agreement with itself and with the program.

The schema of a JobSet is that of its CustomResourceDefinition (`schemas/`, which says where it is
from). Nobody checks a batch script before it is submitted, so its options are compared with those
that are documented at https://slurm.schedmd.com/sbatch.html (25.05).
"""

import copy
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jkmeans.errors import CollapseError, UserError

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
JOBSET = ROOT / "deploy" / "kubernetes" / "jobset.yaml"
SBATCH = ROOT / "deploy" / "slurm" / "train.sbatch"
USELESS_TO_REPEAT = {UserError.exit_status, CollapseError.exit_status}


# Kubernetes


def strict(schema):
    """As `kubectl apply` validates: a field that the schema does not name is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


def make_validator():
    content = json.loads((ROOT / "tests" / "schemas" / "jobset-v0.12.0.json").read_text())
    schema = strict(content["openAPIV3Schema"])
    # Of any object, and not in the schema of this one.
    text = {"type": "string"}
    texts = {"type": "object", "additionalProperties": text}
    metadata = {"name": text, "namespace": text, "labels": texts, "annotations": texts}
    schema["properties"]["metadata"] = {
        "type": "object", "properties": metadata, "additionalProperties": False,
    }  # fmt: skip
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.fixture(scope="module")
def jobset():
    (document,) = yaml.safe_load_all(JOBSET.read_text())
    return document


def pod_of(jobset):
    (workers,) = jobset["spec"]["replicatedJobs"]
    return workers["template"]["spec"], workers["template"]["spec"]["template"]["spec"]


def test_the_jobset_is_valid(jobset):
    errors = [f"{e.json_path}: {e.message}" for e in make_validator().iter_errors(jobset)]
    assert not errors


def misspelled(jobset):
    pod_of(jobset)[1]["terminationGracePeriodSecond"] = 5


def no_number(jobset):
    pod_of(jobset)[0]["completions"] = "four"


def unknown_action(jobset):
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Retry"


def no_operator(jobset):
    del pod_of(jobset)[0]["podFailurePolicy"]["rules"][0]["onExitCodes"]["operator"]


def no_mount_path(jobset):
    del pod_of(jobset)[1]["containers"][0]["volumeMounts"][0]["mountPath"]


@pytest.mark.parametrize(
    "damage", [misspelled, no_number, unknown_action, no_operator, no_mount_path]
)
def test_the_schema_finds_mistakes(jobset, damage):
    damaged = copy.deepcopy(jobset)
    damage(damaged)
    assert not make_validator().is_valid(damaged)


def test_the_jobset_agrees_with_itself(jobset):
    job, pod = pod_of(jobset)
    (workers,) = jobset["spec"]["replicatedJobs"]
    (container,) = pod["containers"]
    environment = {e["name"]: e for e in container["env"]}
    name = jobset["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert environment["JKMEANS_PROCESSES"]["value"] == str(job["completions"])
    # Pods are called JOBSET-REPLICATED_JOB-JOB-INDEX.SUBDOMAIN, the subdomain as the JobSet.
    host, _, port = environment["JKMEANS_COORDINATOR"]["value"].rpartition(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    index = environment["JKMEANS_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    network = jobset["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    shared = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    workdir = next(a for a in container["command"] if a.startswith("--workdir="))
    for path in (workdir.removeprefix("--workdir="), environment["JKMEANS_DATA"]["value"],
                 environment["JKMEANS_CACHE"]["value"]):  # fmt: skip
        assert path.startswith(f"{shared}/")


def test_what_is_useless_to_repeat_is_not_repeated(jobset):
    """What Kubernetes says of a failed pod, through the rules of the Job and of the JobSet."""
    job, pod = pod_of(jobset)
    container = pod["containers"][0]["name"]
    policy = jobset["spec"]["failurePolicy"]
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert set(by_code["onExitCodes"]["values"]) == USELESS_TO_REPEAT
    assert by_code["onExitCodes"]["containerName"] == container
    assert by_code["onExitCodes"]["operator"] == "In"
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # Or the policy would be refused.
    assert job["backoffLimit"] == 0

    def action(reason, message):
        for rule in policy["rules"]:
            patterns = rule["onJobFailureMessagePatterns"]
            if reason in rule["onJobFailureReasons"] and any(
                re.search(p, message) for p in patterns
            ):
                return rule["action"]
        return "RestartJobSet"

    # The sentences of matchPodFailurePolicy in the Job controller of Kubernetes.
    by_status = (
        "Container train for pod default/jkmeans-workers-0-1-x2x4v failed with exit code {} "
        "matching FailJob rule at index 0"
    )
    drained = (
        "Pod default/jkmeans-workers-0-1-x2x4v has condition DisruptionTarget matching FailJob "
        "rule at index 1"
    )
    for status in USELESS_TO_REPEAT:
        assert action("PodFailurePolicy", by_status.format(status)) == "FailJobSet"
    assert action("PodFailurePolicy", drained) == "RestartJobSetAndIgnoreMaxRestarts"
    reached = "Job has reached the specified backoff limit"
    assert action("BackoffLimitExceeded", reached) == "RestartJobSet"
    assert policy["maxRestarts"] > 0
    # New pods would meet old ones that still save.
    assert policy["restartStrategy"] == "BlockingRecreate"
    assert pod["terminationGracePeriodSeconds"] >= 30


def test_the_jobset_runs_the_command_that_users_know(jobset):
    command = pod_of(jobset)[1]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "experiments.train"]  # Python is process 1.
    config = next(a for a in command if a.startswith("--config=")).removeprefix("--config=")
    assert (ROOT / config).is_file()


# SLURM


DOCUMENTED = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task
deadline delay-boot dependency distribution error exclude exclusive export export-file extra
extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name kill-on-invalid-dep
licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe parsable partition
prefer priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal
sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time
time-min tmp tres-bind tres-per-task uid usage use-min-nodes verbose version wait wait-all-nodes
wckey wrap
"""
OPTIONS = set(DOCUMENTED.split())
FLAGS_WITHOUT_VALUE = {"requeue", "no-requeue", "contiguous", "hold", "exclusive", "overcommit"}
FORMS = {
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"([a-z][\w.]*:)?\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d{1,2}(:\d{2}){0,2}",
    "signal": r"([RB]{1,2}:)?(\d+|[A-Z]\w+)(@\d+)?",
    "open-mode": "append|truncate",
    "job-name": r"[\w.-]+",
    "output": r"[\w./%-]+",
}


def directives():
    """Options of the script, by name; SLURM stops to read them at the first command."""
    found = {}
    for line in SBATCH.read_text().splitlines():
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, f"{line!r} is no single long option"
            assert match[1] not in found, f"{match[1]} is there twice"
            found[match[1]] = match[2]
        elif line.strip() and not line.startswith("#"):
            break
    rest = SBATCH.read_text().split("\n\n", 1)[1]
    assert "#SBATCH" not in rest, "an option after the first command would be ignored"
    return found


def test_every_directive_is_an_option_of_sbatch():
    found = directives()
    assert set(found) <= OPTIONS
    for name, value in found.items():
        if name in FLAGS_WITHOUT_VALUE:
            assert value is None, name
        else:
            assert re.fullmatch(FORMS[name], value or ""), f"--{name}={value}"


def test_the_script_saves_before_its_time_is_over_and_comes_back():
    found = directives()
    signal, seconds = found["signal"].split("@")
    assert signal == "TERM"  # To the processes: B: would mean the script alone.
    assert int(seconds) >= 60
    assert "requeue" in found
    assert found["open-mode"] == "append"  # The log of the life before is kept.


def test_the_script_is_one_that_bash_reads():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


def run_script(tmp_path, status, **environment):
    """The script with a srun, a scontrol and a python that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    bodies = {
        # srun passes its command on, as process 1 of 4.
        "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=1 exec "$@"',
        "scontrol": f'[[ $1 == show ]] && echo node7 && echo node8\necho "scontrol $*" >> {log}',
        "python": 'place="$JKMEANS_PROCESS_ID/$JKMEANS_PROCESSES $JKMEANS_COORDINATOR"\n'
        f'echo "$place $*" >> {log}\nexit {status}',
    }
    for name, body in bodies.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    found = subprocess.run(
        ["bash", str(SBATCH), "--config", "c.py", "--workdir", "a folder"],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
             "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4"} | environment,
    )  # fmt: skip
    return found, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (143, 3, True), (137, 20, False)],
)
def test_the_script_starts_again_what_may_succeed(tmp_path, status, restarts, requeued):
    found, log = run_script(tmp_path, status, SLURM_RESTART_COUNT=str(restarts))
    assert found.returncode == status
    assert ("scontrol requeue 123456" in log) == requeued
    (call,) = (line for line in log if line.startswith("1/"))
    assert call == "1/4 node7:23456 -m experiments.train --config c.py --workdir a folder"


def test_both_run_the_same_launcher():
    """Which exists, and has the flags."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "--config" in done.stdout
    assert "--workdir" in done.stdout
