"""The graph, by the real Snakemake and papermill, and a real Slurm where it can be started."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from bikd.graph import read_graph
from bikd.methods import get_method, methods_named, table_rows
from bikd.runs import find_runs

pytest.importorskip(
    "snakemake", reason="the extra `grid` is not installed: pip install -e '.[grid]'"
)
ROOT = Path(__file__).parent.parent
SLURM = ROOT / "tests" / "slurm" / "slurm.sh"
SMALL = dict(dataset="mnist5k", rho=100, seeds="0", teacher="resnet14", epochs=2)


def write(folder, *experiments, **more):
    file = folder / "graph.yaml"
    graph = dict(runs_dir=str(folder / "runs"), threads=1, experiments=list(experiments))
    file.write_text(yaml.safe_dump(graph | more))
    return file


def command(file, *args):
    return [sys.executable, "-m", "snakemake", *args, "--cores", "2", "--configfile", str(file)]


def environment():
    "Of a person, who has no test's variables and this Python's programs."
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("IN_TEST", "CUDA_VISIBLE_DEVICES"):
        env.pop(name, None)
    return env


def snakemake(file, *args, code=0):
    done = subprocess.run(
        command(file, *args), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def planned(file, *args):
    "How often each rule would run."
    said = snakemake(file, "-n", "--quiet", "rules", *args)
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", said, re.M)}


def records(folder):
    "What must be equal between two ways of running: run -> the bytes of curves and weights."
    files = ("config.json", "metrics.csv", "confusion.csv", "student.safetensors")
    runs = [p.parent for p in Path(folder).glob("*/summary.json")]
    return {run.name: {n: (run / n).read_bytes() for n in files} for run in runs}


def test_the_files_of_experiments_name_runs():
    files = (ROOT / "workflow" / "config").glob("*.yaml")
    jobs = {p.stem: read_graph(yaml.safe_load(p.read_text())).jobs() for p in files}
    sizes = {name: len(planned) for name, planned in jobs.items()}
    students = {*table_rows("table1"), *table_rows("controls")} - {"teacher"}
    each = 1 + 3 + len(students)  # teacher, experts, students
    assert sizes["smoke"] == 8
    assert sizes["fashion"] == 3 * each + 3 * 5
    assert sizes["mnist5k"] == 3 * 3 * each
    assert sizes["cifar"] == 2 * 4 * 3 * each  # two datasets, four ρ, three seeds
    for job in jobs["cifar"].values():
        teaches = get_method(job.config.method).trains_teacher_net
        assert job.config.protocol.epochs == 120
        assert job.config.net == ("resnet32x4" if teaches else "resnet8x4")


CIFAR10_JPEG = ROOT / "workflow" / "config" / "cifar10_jpeg.yaml"
SMALL_NETS, PAPERS_NETS = ("resnet20", "resnet8"), ("resnet32x4", "resnet8x4")


@pytest.fixture(scope="module")
def jpeg_jobs():
    "The jobs of `cifar10_jpeg.yaml`. No image is needed to plan them."
    return read_graph(yaml.safe_load(CIFAR10_JPEG.read_text())).jobs()


def test_the_file_of_cifar10_jpeg_plans_the_runs_that_are_committed(jpeg_jobs):
    runs = find_runs(ROOT / "paper_figures" / "records" / "cifar10_jpeg")
    committed = {r.folder.name: r.config for r in runs}
    for nets in (SMALL_NETS, PAPERS_NETS):
        there = {
            run_id
            for run_id, c in committed.items()
            if c.net in nets and (c.rho, c.seed) == (100, 0)
        }
        mine = {
            run_id
            for run_id, job in jpeg_jobs.items()
            if job.config.net in nets and (job.config.rho, job.config.seed) == (100, 0)
        }
        assert mine
        assert mine == there
    assert set(committed) <= set(jpeg_jobs)


@pytest.mark.parametrize(
    "nets,rho,epochs,methods",
    [
        (PAPERS_NETS, 100, 30, "teacher ce kd bkd dive bikd bsce ce_val"),
        (SMALL_NETS, 100, 60, "all controls"),
        (SMALL_NETS, 50, 60, "teacher ce kd bkd bikd bsce"),
    ],
)
def test_the_campaigns_of_cifar10_jpeg(jpeg_jobs, nets, rho, epochs, methods):
    "Nets, length and rows; three seeds each; forward passes in bfloat16."
    configs = [job.config for job in jpeg_jobs.values()]
    mine = [c for c in configs if c.net in nets and c.rho == rho]
    rows = [(c.method, c.seed) for c in mine if not c.method.startswith("expert_")]
    assert sorted(rows) == sorted((m, s) for m in methods_named(methods) for s in (0, 1, 2))
    assert {(c.protocol.epochs, c.protocol.precision) for c in mine} == {(epochs, "bf16")}
    for c in mine:
        assert c.net == nets[not get_method(c.method).trains_teacher_net]


TABLE = dict(table1=dict(notebook="nbs/table1.ipynb", parameters=dict(runs_dir="{runs_dir}")))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    "A finished graph: one seed of teacher, CE, KD and BiKD, two jobs at once."
    folder = tmp_path_factory.mktemp("graph")
    file = write(folder, SMALL | dict(methods="ce kd bikd"), reports=TABLE)
    assert planned(file) == dict(all=1, report=2, train=4, total=7)
    snakemake(file)
    return file


def test_a_graph_leaves_records_notebooks_tables_and_their_provenance(local):
    runs = local.parent / "runs"
    assert len(records(runs)) == 4
    assert len(list(runs.glob("*/run_experiment.ipynb"))) == 4
    for p in [*runs.glob("*/run_experiment.ipynb"), *runs.glob("reports/*.ipynb")]:
        cells = json.loads(p.read_text())["cells"]
        kinds = {o["output_type"] for c in cells for o in c.get("outputs", [])}
        assert "error" not in kinds, p
    assert {p.stem for p in (runs / "reports").glob("*.ipynb")} == {"table1", "provenance"}
    page = (runs / "reports" / "provenance.ipynb").read_text()
    for p in runs.glob("*/summary.json"):
        assert p.parent.name in page
        assert json.loads(p.read_text())["split_hash"] in page


def test_what_is_done_is_not_done_again(local):
    """Nothing after a run; a touched table alone; a changed experiment alone.

    A fresh clone with newer notebooks and no memory of earlier runs trains nothing.
    """
    assert planned(local) == {}
    notebook = ROOT / "nbs" / "table1.ipynb"
    was = notebook.stat()
    os.utime(ROOT / "nbs" / "run_experiment.ipynb")
    os.utime(notebook)
    try:
        assert "train" not in planned(local)
        other = write(
            local.parent,
            SMALL | dict(methods="ce bikd"),
            SMALL | dict(methods="kd", temperature=2.0),
            reports=TABLE,
        )
        assert planned(other)["train"] == 1
        copy = local.parent / "copy"
        shutil.copytree(local.parent / "runs", copy / "runs")
        file = write(copy, SMALL | dict(methods="ce kd bikd"), reports=TABLE)
        assert "train" not in planned(file)
    finally:
        os.utime(notebook, (was.st_atime, was.st_mtime))
        write(local.parent, SMALL | dict(methods="ce kd bikd"), reports=TABLE)


def wait_for(what, seconds=120):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.1)
    return found


def pids(*words):
    "Processes whose command line holds all these words."
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = p.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(w in line for w in words) and int(p.parent.name) != os.getpid():
            found.append(int(p.parent.name))
    return found


def one_run(folder):
    "A graph of one run, and the name of its record."
    file = write(folder, SMALL | dict(methods="ce", epochs=8, seeds="1"))
    (run,) = read_graph(yaml.safe_load(file.read_text())).jobs()
    return file, str(folder / "runs" / run / "summary.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    snakemake(*one_run(folder))
    return records(folder / "runs")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["snakemake", "papermill", "kernel"])
def test_killed_in_mid_training_it_finishes_the_same_work(tmp_path, undisturbed, victim):
    """A lost job is started once more by itself.

    After the loss of everything the same command goes on.
    """
    file, record = one_run(tmp_path)
    runs = tmp_path / "runs"
    with subprocess.Popen(
        command(file, record),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as p:
        checkpoint = wait_for(lambda: next(runs.glob("*/checkpoint.pt"), None))
        first = checkpoint.stat().st_mtime_ns
        # two epochs are done
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != first)
        papermill = pids("papermill", str(runs), "run_experiment")
        assert papermill
        children = [Path(f"/proc/{m}/task/{m}/children").read_text() for m in papermill]
        kernels = [int(pid) for line in children for pid in line.split()]
        victims = dict(
            snakemake=[p.pid, *papermill, *kernels],
            papermill=papermill,
            kernel=[k for k in kernels if "ipykernel" in Path(f"/proc/{k}/cmdline").read_text()],
        )
        for pid in victims[victim]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert (p.returncode == 0) == Path(record).exists() == (victim != "snakemake")
    snakemake(file, record)
    assert records(runs) == undisturbed
    # progress is shown from the epoch that was resumed
    page = next(runs.glob("*/run_experiment.ipynb")).read_text()
    assert "epoch   1/" not in page, "it began anew"


def test_two_at_once_train_a_run_once(tmp_path, undisturbed):
    file, record = one_run(tmp_path)
    both = [
        subprocess.Popen(
            command(file, record),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    wait_for(Path(record).exists)
    first = os.stat(record).st_ino  # a second training would put another file in its place
    assert [p.wait() for p in both] == [0, 0]
    assert records(tmp_path / "runs") == undisturbed
    assert os.stat(record).st_ino == first


def test_a_full_disk_is_said_and_when_there_is_space_the_same_command_goes_on(
    tmp_path, undisturbed
):
    file, record = one_run(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(runs)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be made: it takes root and mount")
    try:
        log = snakemake(file, record, code=1)
        logs = [log, *(p.read_text() for p in runs.glob("*/log.txt"))]
        assert "No space left on device" in "".join(logs)
        assert not Path(record).exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(runs)], check=True)
        snakemake(file, record)
        assert records(runs) == undisturbed
    finally:
        subprocess.run(["umount", str(runs)])


def test_one_failed_run_does_not_stop_the_others_and_a_table_ends_the_log(tmp_path):
    file = write(
        tmp_path,
        SMALL | dict(methods="ce", epochs=1),
        SMALL | dict(methods="teacher kd", lr=1e30, epochs=1),
    )
    log = snakemake(file, code=1)
    assert len(records(tmp_path / "runs")) == 1
    end = log[log.index("runs are finished") :]
    assert "1 of 3 runs" in log
    assert re.search(r"teacher-mnist5k\S+ +NonFiniteLoss: epoch 0", end)
    assert re.search(r"kd-mnist5k\S+ +waits for teacher", end)


def test_a_file_that_cannot_be_meant_is_refused_before_anything_starts(tmp_path):
    for text, experiment in (
        ("dataset='mnist' is unknown", dict(dataset="mnist")),
        ("rhos", dict(rhos=3)),
        ("would leave class", dict(rho=10_000)),
    ):
        assert text in snakemake(write(tmp_path, experiment), code=1)
    assert not (tmp_path / "runs").exists()


NOTE_THE_GPU = """
import os, pathlib, sys, time
note = f"{os.environ['CUDA_VISIBLE_DEVICES']} {time.time()}"
pathlib.Path(sys.argv[1], str(os.getpid())).write_text(note)
time.sleep(1.5)
"""


def test_each_job_gets_a_gpu_of_its_own(tmp_path):
    "Three jobs, two pretended GPUs: two start at once on different ones, the third waits."
    program = [sys.executable, str(ROOT / "workflow" / "scripts" / "one_gpu.py")]
    program += ["--locks", str(tmp_path / "locks"), "--"]
    job = [*program, sys.executable, "-c", NOTE_THE_GPU, str(tmp_path)]
    env = environment() | dict(BIKD_GPUS="0,1")
    jobs = [subprocess.Popen(job, env=env) for _ in range(3)]
    assert [j.wait() for j in jobs] == [0, 0, 0]
    notes = [p.read_text().split() for p in tmp_path.iterdir() if p.is_file()]
    seen = sorted((float(began), gpu) for gpu, began in notes)
    assert {seen[0][1], seen[1][1]} == {"0", "1"}
    assert seen[2][0] - seen[0][0] > 1.4
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    env = environment() | dict(CUDA_VISIBLE_DEVICES="7")
    job = [*program, sys.executable, "-c", show]
    chosen = subprocess.run(job, env=env, capture_output=True, text=True)
    assert chosen.stdout == "7\n"  # the scheduler's choice stands


@pytest.fixture
def slurm(tmp_path):
    if os.geteuid() or not (shutil.which("slurmctld") and shutil.which("munged")):
        needs = "root and Debian's packages slurm-wlm and munge"
        pytest.skip(f"Slurm cannot be started: it takes {needs}")
    if Path("/etc/slurm/slurm.conf").exists() and not Path("/etc/slurm/slurm.conf").is_symlink():
        pytest.skip("this machine has a Slurm of its own")
    start = [str(SLURM), "start", str(tmp_path / "slurm")]
    up = subprocess.run(start, capture_output=True, text=True)
    try:
        if up.returncode:
            pytest.skip(f"Slurm did not start: {up.stderr[-500:]}")
        yield tmp_path
    finally:
        subprocess.run([str(SLURM), "stop", str(tmp_path / "slurm")])


BY_SLURM = (
    "--profile",
    "workflow/profiles/slurm",
    "--slurm-status-command",
    "squeue",
    "--slurm-no-account",
    "--latency-wait",
    "10",
    "--seconds-between-status-checks",
    "2",
    "--slurm-init-seconds-before-status-checks",
    "3",
    "--slurm-no-requeue",
)


def test_a_real_slurm_leaves_the_records_that_the_local_executor_leaves(slurm, local, undisturbed):
    "And a node that vanishes in mid-training loses nothing."
    # a teacher and its student
    file = write(slurm, SMALL | dict(methods="bikd"), reports=TABLE, mem_mb=3000)
    log = snakemake(file, *BY_SLURM)
    assert len(re.findall(r"submitted with SLURM jobid", log, re.I)) == 2
    here, there = records(slurm / "runs"), records(local.parent / "runs")
    assert len(here) == 2
    assert here == {run: there[run] for run in here}
    again = slurm / "again"
    again.mkdir()
    file, record = one_run(again)
    with subprocess.Popen(
        command(file, record, *BY_SLURM),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as p:
        wait_for(lambda: next((again / "runs").glob("*/checkpoint.pt"), None))
        ask = ["sinfo", "-h", "-o", "%n"]
        node = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()

        def set_node(state):
            update = ["scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test"]
            return subprocess.run(update, capture_output=True).returncode

        assert set_node("DOWN") == 0
        time.sleep(2)
        set_node("RESUME")  # unless it has come back by itself
    assert p.returncode == 0
    assert records(again / "runs") == undisturbed
    assert "epoch   1/" not in next((again / "runs").glob("*/run_experiment.ipynb")).read_text()
