"""Runs: killed and resumed, asked for twice at once, logged, refused."""
import json, signal, subprocess, sys
from pathlib import Path

import pytest

from bikd.methods import CE, METHODS, register
from bikd.runs import RunConfig, find_run, load_runs, make_config, run
from bikd.training import NonFiniteLoss

TRAIN = """
import sys, torch
from bikd.runs import RunConfig, run
torch.set_num_threads(1)
for text in sys.argv[2:]: print('fresh' if run(RunConfig.model_validate_json(text), sys.argv[1]).fresh else 'loaded', flush=True)
"""


def start(runs_dir, *configs):
    return subprocess.Popen([sys.executable, '-c', TRAIN, str(runs_dir), *(c.model_dump_json() for c in configs)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def configs(epochs=4):
    teacher = make_config('mnist5k', 100, 0, 'teacher', net='resnet8', protocol=dict(epochs=epochs))
    return teacher, make_config('mnist5k', 100, 0, 'bikd', protocol=dict(epochs=epochs), settings=dict(k=3), teacher_run=teacher.run_id)


def record(runs_dir, cfg):
    "A run's files, less what names the moment."
    folder = Path(runs_dir)/cfg.run_id
    out = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != 'env.json'} # the teacher's memo is a cache, not a record
    summary = json.loads(out.pop('summary.json')); del out['SHA256SUMS'] # it names the moment too, by env.json and summary.json
    for name in ('train_time_s', 'teacher_time_s', 'teacher_answers_computed'): del summary[name]
    return out | dict(summary=summary)


def test_a_killed_run_resumes_to_the_same_record_bit_for_bit(tmp_path):
    teacher, student = configs()
    calm = start(tmp_path/'calm', teacher, student); out, _ = calm.communicate(timeout=300)
    assert calm.returncode == 0 and out.count('fresh') == 2, out
    for cfg in (teacher, student): # kill -9 once after each run's second epoch
        checkpoint = tmp_path/'torn'/cfg.run_id/'checkpoint.pt'
        p = start(tmp_path/'torn', teacher, student)
        lines = iter(p.stdout.readline, '')
        assert any(cfg.method in l and 'epoch   2/4' in l for l in lines)
        p.send_signal(signal.SIGKILL); p.wait()
        assert checkpoint.exists() and find_run(tmp_path/'torn', cfg.run_id) is None
    again = start(tmp_path/'torn', teacher, student); out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    for cfg in (teacher, student): assert record(tmp_path/'calm', cfg) == record(tmp_path/'torn', cfg)
    assert set(load_runs(tmp_path/'torn').method) == {'teacher', 'bikd'}


def test_two_processes_that_ask_for_one_run_train_it_once(tmp_path):
    teacher, _ = configs(epochs=1)
    both = [start(tmp_path, teacher) for _ in range(2)]
    said = sorted(p.communicate(timeout=300)[0].splitlines()[-1] for p in both)
    assert [p.returncode for p in both] == [0, 0] and said == ['fresh', 'loaded']


def test_tensorboard_scalars_are_those_of_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    teacher, _ = configs(epochs=2)
    r = run(teacher, tmp_path, show=False, tensorboard=True)
    events = EventAccumulator(str(r.folder/'tensorboard')).Reload()
    assert [round(e.value, 3) for e in events.Scalars('test_acc_pct')] == [round(v, 3) for v in r.metrics.test_acc_pct]
    assert [e.step for e in events.Scalars('train_loss')] == [1, 2]


def test_summary_and_files_keep_the_contract(tmp_path):
    teacher, student = configs(epochs=1)
    run(teacher, tmp_path, show=False); r = run(student, tmp_path, show=False)
    assert {'config.json', 'metrics.csv', 'summary.json', 'env.json', 'student.safetensors', 'weight_net.safetensors'} <= {p.name for p in r.folder.iterdir()}
    keys = ('run_id dataset rho method seed preset n_per_class split_hash test_acc_pct_last test_acc_pct_val_selected test_acc_pct_best_on_test per_class_acc_pct '
            'many_acc_pct medium_acc_pct few_acc_pct ece epochs train_time_s device').split()
    assert set(keys) <= set(r.summary) and r.folder.name == r.summary['run_id'] == r.config.run_id
    assert not list(r.folder.glob('checkpoint*')) and not list(r.folder.glob('.*.tmp'))


def test_a_diverging_run_stops_and_leaves_no_summary(tmp_path):
    cfg = make_config('mnist5k', 100, 0, 'ce', protocol=dict(epochs=1, batch_size=1000, lr=1e30))
    with pytest.raises(NonFiniteLoss, match='after epoch 0: the val cross-entropy is'): run(cfg, tmp_path, show=False)
    assert find_run(tmp_path, cfg.run_id) is None and len(load_runs(tmp_path)) == 0


def test_records_of_an_unknown_method_are_not_called_damaged(tmp_path):
    @register
    class Mine(CE): name = 'mine'
    cfg = make_config('mnist5k', 100, 0, 'mine', protocol=dict(epochs=1))
    assert run(cfg, tmp_path, show=False).fresh and list(load_runs(tmp_path).method) == ['mine']
    del METHODS['mine']
    with pytest.raises(ValueError, match="'mine' is unknown.*register or install that first"): load_runs(tmp_path)


def test_what_a_killed_process_left_is_tidied(tmp_path):
    cfg = make_config('mnist5k', 100, 0, 'ce', protocol=dict(epochs=1)); folder = tmp_path/cfg.run_id
    folder.mkdir(); (folder/'.checkpoint.pt.1.tmp').write_bytes(b'half')
    run(cfg, tmp_path, show=False); (folder/'checkpoint.pt').write_bytes(b'left')
    assert not run(cfg, tmp_path, show=False).fresh and not list(folder.glob('.*.tmp')) and not (folder/'checkpoint.pt').exists()


def test_configs_refuse_what_cannot_be_meant():
    good = make_config('mnist5k', 100, 0, 'kd', teacher_run='t')
    for change, message in ((dict(rho=0.5), '>= 1'), (dict(rho=5000.), 'without an image'), (dict(dataset='x'), 'unknown'), (dict(method='x'), 'unknown'), (dict(net='x'), 'unknown'),
                            (dict(settings=dict(temperature=-1.)), 'greater than 0'), (dict(settings=dict(tau=1.)), 'tau'), (dict(seed=-1), 'greater than or equal'),
                            (dict(seed=1.5), 'integer'), (dict(colour='red'), 'colour'), (dict(teacher_run=None), 'needs')):
        with pytest.raises(ValueError, match=message): RunConfig.model_validate_json(json.dumps(good.model_dump(mode='json') | change))
