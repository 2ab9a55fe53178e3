"""Runs and studies under faults that really happen: processes killed, files altered, disks full, two at once.

Most tests use a stand-in template that trains nothing. It runs through the same command, kernel, lock and files as the real one."""
import errno, json, os, signal, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
import nbformat, pytest
from qisal.core import BadInput, RunSpec, code_hash, read_json
from qisal import run as R

SPEC = RunSpec(sample=True, epochs=1)


# ---------------------------------------------------------------- stand-in template

def make_template(path, *bodies, data, drop=(), extra=''):
    "A notebook with the parameters of the real one, the cells `bodies`, and a last cell that writes a result."
    params = {k: v for k, v in {**RunSpec().to_dict(), 'out': '', 'n_threads': 1}.items() if k not in drop}
    cell = nbformat.v4.new_code_cell('\n'.join(f'{k} = {v!r}' for k, v in params.items()) + '\n' + extra, metadata=dict(tags=['parameters']))
    head = f'''import json, os, pathlib, time
from qisal.core import RunSpec, code_hash
here = pathlib.Path(out)
def wait(name):
    "Say that this point was reached; stay as long as the test wants."
    note = os.environ.get('STAND_IN_NOTES')
    if note: pathlib.Path(note, f'{{name}}-{{os.getpid()}}').touch()
    while os.environ.get('STAND_IN_STOP') == name: time.sleep(.05)
wait('start')'''
    tail = f'''result = dict(spec={{k: globals()[k] for k in RunSpec().to_dict()}}, accuracy=.5 + seed/100, n_test=1000, alphas=[], provenance={{}},
    masking=dict(gradient=dict(frac=[0, .5], accuracy=[.5, .1], auc=.6)), cost=dict(weight_bits=8000), timing=dict(total=.5, threads=os.environ['OMP_NUM_THREADS']),
    code=code_hash(), data={data!r})
(here/'result.json').write_text(json.dumps(result))
wait('result')'''
    nb = nbformat.v4.new_notebook(cells=[cell, *map(nbformat.v4.new_code_cell, (head, *bodies, tail))])
    nbformat.write(nb, path)
    return path

@pytest.fixture(scope='session')
def data(): return R.data_checksums(SPEC)

@pytest.fixture
def template(tmp_path, data): return make_template(tmp_path/'stand_in.ipynb', data=data)

@pytest.fixture
def out(tmp_path): return tmp_path/'study'

def spec_file(tmp_path, spec=SPEC):
    path = tmp_path/f'{spec.run_id}.json'
    path.write_text(json.dumps(spec.to_dict()), encoding='utf-8')
    return path

def folder(out, spec=SPEC): return Path(out)/'runs'/spec.run_id

def _hear_ctrl_c():
    "A shell starts what runs in its background deaf to Ctrl-C, and children inherit that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)

@contextmanager
def command(cmd, notes, stop=None):
    "Start a command in its own session; whatever happens, nothing of it is left afterwards."
    notes.mkdir(exist_ok=True)
    env = {**os.environ, 'STAND_IN_NOTES': str(notes), 'STAND_IN_STOP': stop or '', 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, '-m', 'qisal.cli', *map(str, cmd)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True, encoding='utf-8',
                         preexec_fn=_hear_ctrl_c)
    try: yield p
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.communicate()
        for pid in pids(notes): kill(pid)

def run_cmd(tmp_path, out, template, spec=SPEC): return ['run', '--spec', spec_file(tmp_path, spec), '--out', out, '--template', template]
def pids(notes, name=''): return {int(o.name.rsplit('-')[-1]) for o in notes.glob(f'{name}*-*')}
def kill(pid):
    with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)  # it may end by itself at any moment

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False

def until(what, seconds=90.):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := what(): return got
        time.sleep(.02)
    raise AssertionError(f'waited {seconds} s in vain')


# ---------------------------------------------------------------- done, altered, stale

def test_finished_run_is_not_repeated(out, template, data):
    m = R.run_one(SPEC, out, template)
    assert m['accuracy'] == .5 and m['fingerprint']['all'] == R.fingerprint(SPEC, R.template_hash(template), code_hash(), data)['all']
    assert {o.name for o in folder(out).iterdir()} == {'spec.json', 'run.ipynb', 'metrics.json', 'log.txt'}
    before = {o: o.stat().st_mtime_ns for o in folder(out).iterdir()}
    assert R.run_one(SPEC, out, template, n_threads=2) == m  # the number of threads does not count
    assert {o: o.stat().st_mtime_ns for o in folder(out).iterdir()} == before
    assert not (out/'stale').exists()

def test_notebook_is_executed_readable_and_without_machine_paths(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    R.run_one(SPEC, 'study', template)
    text = (folder('study')/'run.ipynb').read_text(encoding='utf-8')
    nb = nbformat.reads(text, 4)
    assert all(o.execution_count for o in nb.cells if o.cell_type == 'code')
    assert 'seed = 0' in nb.cells[1].source and str(tmp_path) not in text
    assert str(tmp_path) not in (folder('study')/'metrics.json').read_text(encoding='utf-8')

@pytest.mark.parametrize('damage', [
    lambda s: s.replace('"accuracy": 0.5,', '"accuracy": 0.9,', 1), lambda s: s[:200], lambda s: '', lambda s: '[]',
    lambda s: s.replace('"n_test": 1000', '"n_test": 999')], ids=['accuracy', 'cut off', 'empty', 'no object', 'n_test'])
def test_altered_metrics_are_not_believed(out, template, data, damage):
    folder(out).mkdir(parents=True)
    whole = json.dumps(fake_metrics(template, data), indent=1)
    (folder(out)/'metrics.json').write_text(whole, encoding='utf-8')
    assert R.is_done(folder(out), SPEC, template, data)
    assert damage(whole) != whole
    (folder(out)/'metrics.json').write_text(damage(whole), encoding='utf-8')
    assert not R.is_done(folder(out), SPEC, template, data) and R.read_metrics(folder(out)) is None

def fake_metrics(template, data, **changed):
    m = dict(format=R.RESULTS_FORMAT, spec=SPEC.to_dict(), accuracy=.5, n_test=1000, masking={}, alphas=[], cost={}, timing={}, provenance={}, code=code_hash(), data=data,
             fingerprint=R.fingerprint(SPEC, R.template_hash(template), code_hash(), data))
    return R._seal({**m, **changed})

def test_altered_metrics_are_redone(out, template):
    m = R.run_one(SPEC, out, template)
    path = folder(out)/'metrics.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"accuracy": 0.5,', '"accuracy": 0.9,', 1), encoding='utf-8')
    assert R.run_one(SPEC, out, template)['accuracy'] == .5 == read_json(path)['accuracy']

def test_result_of_another_template_is_kept_aside_and_redone(out, template, data, tmp_path):
    old = R.run_one(SPEC, out, template)
    other = make_template(tmp_path/'other.ipynb', '1 + 1', data=data)
    assert R.changed_parts(folder(out), SPEC, other, data) == ['template']
    new = R.run_one(SPEC, out, other)
    assert new['fingerprint']['template'] != old['fingerprint']['template']
    aside, = (out/'stale').iterdir()
    assert R.read_metrics(aside) == old and (aside/'run.ipynb').exists()
    R.run_one(SPEC, out, template)
    assert len(list((out/'stale').iterdir())) == 2

@pytest.mark.parametrize('part', ['spec', 'template', 'code', 'data'])
def test_every_part_of_the_fingerprint_counts(out, template, data, part):
    folder(out).mkdir(parents=True)
    good = fake_metrics(template, data)
    (folder(out)/'metrics.json').write_text(json.dumps({**R._seal({**good, 'fingerprint': {**good['fingerprint'], part: '0'*64}})}), encoding='utf-8')
    assert R.read_metrics(folder(out)) is not None and not R.is_done(folder(out), SPEC, template, data)

def test_prose_and_outputs_of_the_template_do_not_count(template):
    before, nb = R.template_hash(template), nbformat.read(template, 4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell('more words'))
    nb.cells[1].outputs = [nbformat.v4.new_output('stream', text='said')]
    nbformat.write(nb, template)
    assert R.template_hash(template) == before
    nb.cells[-1].source += '\n1'
    nbformat.write(nb, template)
    assert R.template_hash(template) != before

def test_damaged_data_file_stops_the_study_before_it_starts(out, template, monkeypatch, tmp_path):
    import numpy as np
    root = tmp_path/'cache'
    (root/'mnist').mkdir(parents=True)
    for part, shape in dict(x_train=(60000, 28, 28, 1), y_train=(60000,), x_test=(10000, 28, 28, 1), y_test=(10000,)).items():
        np.save(root/'mnist'/f'{part}.npy', np.zeros(shape, np.uint8))
    import qisal.data as D
    monkeypatch.setenv('QISAL_DATA', str(root))
    monkeypatch.setattr(D, '_FETCH', {})  # no way to fetch it anew
    with pytest.raises(BadInput): R.run_study([replace(SPEC, sample=False)], out, 1, template=template, say=lambda o: None)
    assert not list((out/'runs').iterdir()) and not (out/'manifest.json').exists()


# ---------------------------------------------------------------- killed at any moment

@pytest.mark.parametrize('moment', ['kernel', 'start', 'result'])
def test_killed_worker_leaves_no_kernel_and_is_redone_from_scratch(tmp_path, out, template, moment):
    "`kill -9` before the kernel runs a cell, in the first cell, and after the result was written."
    notes, stop = tmp_path/'notes', 'start' if moment == 'kernel' else moment
    with command(run_cmd(tmp_path, out, template), notes, stop) as p:
        until(lambda: (folder(out)/'spec.json').exists() if moment == 'kernel' else pids(notes, stop))
        p.kill()
        p.wait()
        (folder(out)/'junk').touch()
        kernels = pids(notes)
        again = threading.Thread(target=R.run_one, args=(SPEC, out, template))  # at once: it has to wait for the orphaned kernel
        again.start()
        until(lambda: not any(map(alive, kernels)), 10)
        again.join(120)
    assert R.read_metrics(folder(out))['accuracy'] == .5
    assert not (folder(out)/'junk').exists() and not (folder(out)/'result.json').exists()

def test_orphaned_kernel_holds_the_lock(tmp_path, out, data):
    "A kernel that does not die with its parent, because it asked the system not to and then was stopped."
    t = make_template(tmp_path/'t.ipynb', "import ctypes\nctypes.CDLL(None).prctl(1, 0)\nwait('orphan')", data=data)
    notes = tmp_path/'notes'
    with command(run_cmd(tmp_path, out, t), notes, 'orphan') as p:
        kernel, = until(lambda: pids(notes, 'orphan'))
        os.kill(kernel, signal.SIGSTOP)
        p.kill()
        p.wait()
        said, entered = [], threading.Event()
        def enter():
            with R.RunLock(out, SPEC.run_id, said.append): entered.set()
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(1.5) and 'another process' in said[0]
        os.kill(kernel, signal.SIGCONT)  # now it notices that its parent is gone
        assert entered.wait(10)
        until(lambda: not alive(kernel), 5)
        thread.join()
    R.shutil.rmtree(private(out))

def test_killed_kernel_fails_the_run_and_the_next_try_succeeds(tmp_path, out, template):
    notes = tmp_path/'notes'
    with command(run_cmd(tmp_path, out, template), notes, 'start') as p:
        kernel, = until(lambda: pids(notes, 'start'))
        os.kill(kernel, signal.SIGKILL)
        said, _ = p.communicate(timeout=120)
    assert p.returncode == 1 and 'the kernel died' in said
    error = read_json(folder(out)/'error.json')
    assert error['type'] == 'DeadKernelError' and not (folder(out)/'metrics.json').exists()
    R.run_one(SPEC, out, template)
    assert not (folder(out)/'error.json').exists()

def test_sigterm_ends_worker_and_kernel_and_is_no_failure(tmp_path, out, template):
    notes = tmp_path/'notes'
    with command(run_cmd(tmp_path, out, template), notes, 'start') as p:
        kernel, = until(lambda: pids(notes, 'start'))
        p.terminate()
        p.communicate(timeout=60)
        until(lambda: not alive(kernel), 5)
    assert p.returncode == 143 and not (folder(out)/'error.json').exists() and not (folder(out)/'metrics.json').exists()

def study_cmd(out, template, bits='32,4'):
    return ['study', '--bits', bits, '--guided', 'off', '--epochs', '1', '--jobs', '2', '--out', out, '--template', template]

def children(pid):
    return {int(o) for t in Path(f'/proc/{pid}/task').glob('*/children') for o in t.read_text(encoding='utf-8').split()}

@pytest.mark.parametrize('how', ['kill', 'ctrl-c'])
def test_pool_that_dies_takes_workers_and_kernels_along(tmp_path, out, template, how):
    notes = tmp_path/'notes'
    with command(study_cmd(out, template), notes, 'start') as p:
        kernels = until(lambda: len(o := pids(notes, 'start')) == 2 and o, 200)
        workers = children(p.pid)
        assert len(workers) == 2
        p.send_signal(signal.SIGKILL if how == 'kill' else signal.SIGINT)
        said, _ = p.communicate(timeout=60)
        until(lambda: not any(map(alive, kernels | workers)), 10)
    if how == 'ctrl-c': assert p.returncode == 130 and 'qisal: stopped' in said and 'Traceback' not in said
    assert not list(out.glob('runs/*/metrics.json')) and not list(out.glob('runs/*/error.json'))
    specs = R.grid('smoke', bits=['32', '4'], guided=['off'], epochs=1)
    assert set(R.run_study(specs, out, 2, template=template, say=lambda o: None).status) == {'done'}

def test_two_studies_at_once_do_each_run_once(tmp_path, out, data):
    counted = make_template(tmp_path/'counted.ipynb', "import os\nwith open(here.parent.parent/'count', 'a') as f: f.write(f'{bits}\\n')\ntime.sleep(.5)", data=data)
    specs = R.grid('smoke', bits=['32', '4', '2'], guided=['off'], epochs=1)
    tables = []
    def go(order): tables.append(R.run_study(order, out, 2, 1, counted, say=lambda o: None))
    threads = [threading.Thread(target=go, args=(o,)) for o in (specs, specs[::-1])]
    for o in threads: o.start()
    for o in threads: o.join(300)
    assert len(tables) == 2 and all(set(o.status) == {'done'} for o in tables)
    assert sorted((out/'count').read_text(encoding='utf-8').split()) == ['2', '32', '4']


# ---------------------------------------------------------------- failures

def test_failed_run_does_not_stop_the_others(tmp_path, out, data):
    t = make_template(tmp_path/'t.ipynb', "from qisal.core import TrainingFailed\nif bits == '4': raise TrainingFailed('the training loss became nan in epoch 3 of 5, batch 2 of 9')", data=data)
    specs, said = R.grid('smoke', bits=['4', '32', '2'], guided=['off'], epochs=1), []
    df = R.run_study(specs, out, 1, template=t, say=said.append).set_index('bits')
    assert df.status.to_dict() == {'32': 'done', '4': 'failed', '2': 'done'} and 'epoch 3' in df.error['4']
    error = read_json(folder(out, specs[0])/'error.json')
    assert error['type'] == 'TrainingFailed' and error['epoch'] == 3 and error['cell'] == 4
    assert (folder(out, specs[0])/'run.failed.ipynb').exists() and not (folder(out, specs[0])/'run.part.ipynb').exists()
    assert '[1/3]' in said[0] and 'FAILED (TrainingFailed' in said[0] and 'min left' in said[0] and 'accuracy 50.00%' in said[1]
    summary = (out/'summary.csv').read_text(encoding='utf-8').splitlines()
    assert len(summary) == 4 and summary[0].startswith('run_id,status,dataset')

def test_failed_run_is_tried_again(tmp_path, out, data, template):
    t = make_template(tmp_path/'stand_in.ipynb', '1/0', data=data)
    with pytest.raises(R.RunFailed, match='ZeroDivisionError'): R.run_one(SPEC, out, t)
    make_template(t, data=data)
    assert R.run_one(SPEC, out, t)['accuracy'] == .5
    assert {o.name for o in folder(out).iterdir()} == {'spec.json', 'run.ipynb', 'metrics.json', 'log.txt'}

RESULTS = {
    'no result.json': ("(here/'result.json').unlink()", 'no readable result.json'),
    'cut off': ("(here/'result.json').write_text('{')", 'no readable result.json'),
    'a key missing': ("del result['cost']", 'lacks cost'),
    'accuracy in %': ("result['accuracy'] = 93.", 'not a share'),
    'accuracy NaN': ("result['accuracy'] = float('nan')", 'not a share'),
    'another spec': ("result['spec']['bits'] = '2'", 'another spec'),
    'another qisal': ("result['code'] = '0'", 'another version'),
    'curve too short': ("result['masking']['gradient']['accuracy'] = [.5]", 'masking curve'),
}

@pytest.mark.parametrize('case', RESULTS)
def test_result_that_is_none_fails_the_run(tmp_path, out, data, case):
    code, message = RESULTS[case]
    t = make_template(tmp_path/'t.ipynb', data=data)
    nb = nbformat.read(t, 4)
    nb.cells.append(nbformat.v4.new_code_cell(code + ('' if 'here' in code else "\n(here/'result.json').write_text(json.dumps(result))")))
    nbformat.write(nb, t)
    with pytest.raises(R.RunFailed, match=message): R.run_one(SPEC, out, t)
    assert (folder(out)/'run.failed.ipynb').exists() and not (folder(out)/'metrics.json').exists()

def test_kernel_gets_its_threads_and_everything_is_given_back(tmp_path, out, data, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    monkeypatch.setenv('MPLBACKEND', 'agg')
    t, before = make_template(tmp_path/'t.ipynb', data=data), dict(os.environ)
    m = R.run_one(SPEC, out, t, n_threads=2)
    assert m['timing'] == dict(total=.5, threads='2', n_threads=2)
    assert dict(os.environ) == before and not private(out).exists()

def private(out, spec=SPEC):
    return Path(R.tempfile.gettempdir())/f'qisal-{os.getuid()}-{R._sha(str((out/".locks"/f"{spec.run_id}.lock").resolve()))[:12]}'

def test_what_a_killed_run_left_in_the_temporary_folder_is_cleared(tmp_path, out, template):
    notes = tmp_path/'notes'
    with command(run_cmd(tmp_path, out, template), notes, 'start') as p:
        until(lambda: pids(notes, 'start'))
        assert private(out).stat().st_mode & 0o777 == 0o700 and (private(out)/'kernel.json').exists()
        p.kill()
        p.wait()
    assert private(out).exists()
    R.run_one(SPEC, out, template)
    assert not private(out).exists()

def test_sockets_lie_in_the_private_folder_and_nowhere_else(tmp_path, out, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = make_template(tmp_path/'t.ipynb', "from ipykernel.kernelapp import IPKernelApp\napp = IPKernelApp.instance()\n(here/'where.json').write_text(json.dumps([app.transport, app.ip, os.listdir('.')]))", data=data)
    R.run_one(SPEC, out, t)
    transport, ip, files = read_json(folder(out)/'where.json')
    assert transport == 'ipc' and ip == f'{private(out)}/ipc' and len(ip) < 100 and not [o for o in files if 'ipc' in o]

def test_worker_that_dies_is_shown_as_failed(tmp_path, out, data):
    t = make_template(tmp_path/'t.ipynb', "if bits == '4':\n    import signal\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(60)", data=data)
    specs = R.grid('smoke', bits=['4', '32'], guided=['off'], epochs=1)
    df = R.run_study(specs, out, 1, template=t, say=lambda o: None).set_index('bits')
    assert df.status.to_dict() == {'32': 'done', '4': 'failed'} and 'signal 9' in df.error['4']
    assert read_json(folder(out, specs[0])/'error.json')['type'] == 'ProcessDied' and not private(out, specs[0]).exists()


# ---------------------------------------------------------------- templates and grids

@pytest.mark.parametrize('kw,message', [(dict(drop=('guided', 'lr')), 'lacks parameter.*guided, lr'), (dict(extra='bitz = 4'), 'unknown parameter.*bitz'),
    (dict(extra='x = 1 + 1'), 'literal'), (dict(extra='import os'), 'literal')])
def test_template_parameters_are_checked_first(tmp_path, out, data, kw, message):
    t = make_template(tmp_path/'t.ipynb', data=data, **kw)
    with pytest.raises(BadInput, match=message): R.run_one(SPEC, out, t)
    with pytest.raises(BadInput, match=message): R.run_study([SPEC], out, 1, template=t)
    assert not out.exists()

def test_template_that_is_no_notebook(tmp_path, out):
    for text, message in (('hello', 'no notebook'), ('{}', 'no notebook'), ('{"cells": []}', "0 cells tagged")):
        (tmp_path/'t.ipynb').write_text(text, encoding='utf-8')
        with pytest.raises(BadInput, match=message): R.run_one(SPEC, out, tmp_path/'t.ipynb')
    with pytest.raises(BadInput, match='not a file'): R.run_one(SPEC, out, tmp_path/'none.ipynb')

def test_the_real_template_has_all_parameters(): R.check_template()

@pytest.mark.parametrize('wish', [dict(profile='fast'), dict(datasets=['mnits']), dict(bits=['5']), dict(guided=['maybe']), dict(seeds=[-1]), dict(seeds=[.5]), dict(bits=[]),
    dict(epochs=0), dict(epochs=-1), dict(frac=0), dict(frac=1), dict(attributions=['lime']), dict(n_train=0), dict(momentum=.9)], ids=str)
def test_grid_refuses(wish):
    with pytest.raises(BadInput): R.grid(**wish)

def test_grid_orders_and_dedupes():
    g = R.grid('smoke', bits=['4', '32', '4'], guided=[False, 'off'], seeds=[1, 0])
    assert [(o.seed, o.bits) for o in g] == [(1, '4'), (1, '32'), (0, '4'), (0, '32')]
    assert len(R.grid('smoke')) == 8 and all(o.sample for o in R.grid('smoke'))
    c, = R.grid('smoke', datasets=['cifar10'], bits=['4'], guided=[True])
    assert not c.sample and c.n_train == 2000
    assert {o.arch for o in R.grid('paper', datasets=['cifar10'])} == {'resnet20'} and len(R.grid('paper')) == 3*8*2*5

@pytest.mark.parametrize('kw', [dict(jobs=0), dict(jobs=-1), dict(n_threads=0), dict(specs=[])], ids=str)
def test_study_refuses_before_anything(out, template, kw):
    with pytest.raises(BadInput): R.run_study(**{'specs': [SPEC], 'out': out, 'template': template, **kw})
    assert not out.exists()


# ---------------------------------------------------------------- the place to write to

def refused(out, template, message):
    with pytest.raises(BadInput, match=message): R.run_one(SPEC, out, template)
    with pytest.raises(BadInput, match=message): R.run_study([SPEC], out, 1, template=template, say=lambda o: None)

def test_output_is_a_file(tmp_path, template):
    (tmp_path/'f').write_text('mine', encoding='utf-8')
    refused(tmp_path/'f', template, 'is a file')
    refused(tmp_path/'f'/'below', template, 'is a file')
    assert (tmp_path/'f').read_text(encoding='utf-8') == 'mine'

def test_output_cannot_be_written(out, template, monkeypatch):
    if os.geteuid():
        out.mkdir(mode=0o500)
        return refused(out, template, 'cannot be written')
    def no(*a, **k): raise PermissionError(errno.EACCES, 'Permission denied')  # root may write anywhere
    monkeypatch.setattr(R.tempfile, 'TemporaryFile', no)
    refused(out, template, 'cannot be written')

def test_output_on_a_read_only_file_system(tmp_path, template):
    with small_disk(tmp_path/'disk', '1m,ro') as disk: refused(disk/'study', template, 'cannot be written')
    if Path('/proc/sys').exists(): refused(Path('/proc/sys/study'), template, 'cannot be')

@pytest.mark.parametrize('found', [0, 2, None, 'x'])
def test_results_of_another_version_are_refused_and_left_alone(out, template, found):
    out.mkdir()
    text = json.dumps(dict(format=found))
    (out/'manifest.json').write_text(text, encoding='utf-8')
    refused(out, template, 'format')
    with pytest.raises(BadInput, match='format|runs'): R.load_runs(out)
    assert [o.name for o in out.iterdir()] == ['manifest.json'] and (out/'manifest.json').read_text(encoding='utf-8') == text

def test_metrics_of_another_version_are_never_overwritten(out, template, data):
    folder(out).mkdir(parents=True)
    (folder(out)/'metrics.json').write_text(json.dumps(fake_metrics(template, data, format=2)), encoding='utf-8')
    refused(out, template, 'format 2')

@contextmanager
def small_disk(path, size):
    "A tmpfs of `size`, where the test may mount one."
    path.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(path)], capture_output=True).returncode: pytest.skip('mounting is not allowed here')
    try: yield path
    finally: subprocess.run(['umount', '-l', str(path)], check=True)

def test_full_disk_is_found_before_the_run(tmp_path, template):
    with small_disk(tmp_path/'disk', '1m') as disk:
        refused(disk/'study', template, 'is full')
        assert not list(disk.glob('study/runs/*'))

def test_disk_that_fills_up_in_a_run(tmp_path, data):
    t = make_template(tmp_path/'t.ipynb', "with open(here/'big', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))", data=data)
    with small_disk(tmp_path/'disk', '20m') as disk:
        refused(disk/'study', t, 'is full')
        assert not folder(disk/'study').exists()

@pytest.mark.parametrize('moment', ['spec.json', 'metrics.json', 'manifest.json', 'summary.csv'])
def test_no_space_while_writing_a_file(out, template, monkeypatch, moment):
    real = os.fsync
    def full(fd):
        if f'.{moment}.' in os.readlink(f'/proc/self/fd/{fd}'): raise OSError(errno.ENOSPC, 'No space left on device')
        return real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    call = (lambda: R.run_one(SPEC, out, template)) if moment in ('spec.json', 'metrics.json') else lambda: R.run_study([SPEC], out, 1, template=template, say=lambda o: None)
    with pytest.raises(BadInput, match='is full'): call()
    assert not list(out.rglob('*.part')) and not list(out.rglob('metrics.json')) and not (out/moment).exists()
    monkeypatch.undo()
    assert R.run_one(SPEC, out, template)['accuracy'] == .5

def test_full_disk_in_a_worker_stops_the_study(out, template, monkeypatch):
    class Refusing:
        def __init__(self, *a): pass
        def wait(self): return 2, 'qisal: error: the disk that holds x is full; free some space.\n'
        def stop(self): pass
    monkeypatch.setattr(R, '_Worker', Refusing)
    with pytest.raises(BadInput, match='^the disk that holds x is full'): R.run_study([SPEC, replace(SPEC, seed=1)], out, 1, template=template, say=lambda o: None)


# ---------------------------------------------------------------- files

def test_files_are_measured_after_the_last_training(out, template, monkeypatch):
    "... those that were asked for, once; not at all with `measure=False`."
    specs, asked = R.grid('smoke', bits=['2', '32'], guided=['off'], epochs=1), []
    def note(where, run_ids, say): asked.append((where, sorted(run_ids), sorted(o['run_id'] for o in R.load_runs(where) if o['status'] == 'done')))
    monkeypatch.setattr(R, 'measure_study', note)
    R.run_study(specs, out, 2, template=template, say=lambda o: None)
    ids = sorted(o.run_id for o in specs)
    assert asked == [(out, ids, ids)]
    R.run_study(specs[:1], out, 1, template=template, say=lambda o: None, measure=False)
    assert len(asked) == 1

def test_a_run_without_a_model_is_no_trouble(out, template):
    df = R.run_study([SPEC], out, 1, template=template, say=lambda o: None)
    assert list(df.status) == ['done'] and list(df.error) == [''] and df.file_bytes.isna().all() and not (folder(out)/'shipped.json').exists()


# ---------------------------------------------------------------- what a study leaves

def test_manifest_and_summary(out, template, data):
    specs = R.grid('smoke', bits=['2', '32'], guided=['off'], seeds=[3], epochs=1)
    R.run_study(specs[:1], out, 1, 1, template, command='qisal study --bits 2', say=lambda o: None)
    df = R.run_study(specs, out, 1, 1, template, command='qisal study --bits 2,32', say=lambda o: None)
    m = read_json(out/'manifest.json')
    assert m['format'] == R.RESULTS_FORMAT and m['commands'] == ['qisal study --bits 2', 'qisal study --bits 2,32']
    assert {k: RunSpec.from_dict(v) for k, v in m['specs'].items()} == {o.run_id: o for o in specs}
    assert m['data'] == {'mnist (sample)': data} and m['provenance']['python']
    assert list(df.bits) == ['32', '2'] and list(df.accuracy) == [.53, .53] and list(df.auc_gradient) == [.6, .6] and list(df.n_threads) == [1, 1]
    import pandas as pd
    again = pd.read_csv(out/'summary.csv', dtype=dict(bits=str), keep_default_na=False, na_values=['nan'])
    assert list(again.run_id) == list(df.run_id) and list(again.weight_bits) == [8000, 8000]

def test_partial_run_is_shown_as_such(out, template):
    R.run_one(SPEC, out, template)
    (folder(out)/'metrics.json').unlink()
    run, = R.load_runs(out)
    assert run['status'] == 'partial' and run['metrics'] is None
    assert list(R.summary(out).status) == ['partial']

def test_load_runs_of_nothing(tmp_path):
    with pytest.raises(BadInput, match='no results folder'): R.load_runs(tmp_path)


# ---------------------------------------------------------------- right or wrong of every test image

def some_answers(n=1003, seed=0):
    import numpy as np
    right = np.random.default_rng(seed).random((3, n)) < np.array([.9, .5, .2])[:, None]
    m = dict(accuracy=right[0].mean(), n_test=n, masking=dict(gradient=dict(frac=[0, .1, .2], accuracy=right.mean(1).tolist(), fill='corner', order='morf')),
             road=dict(morf={}, lerf=dict(gradient=dict(frac=[0], accuracy=[right[1].mean()]))))
    return right, m, R.pack_correct(right[0], {('gradient', 'corner', 'morf'): right, ('gradient', 'road', 'lerf'): right[1:2]})

def test_answers_are_kept_at_eight_images_a_byte(tmp_path):
    import hashlib, numpy as np
    right, m, raw = some_answers()
    (tmp_path/'correct.npz').write_bytes(raw)
    with np.load(tmp_path/'correct.npz', allow_pickle=False) as z:
        assert sorted(z.files) == ['accuracy', 'gradient/corner/morf', 'gradient/road/lerf', 'n_test'] and z['gradient/corner/morf'].shape == (3, 126)
        assert (z['accuracy'] == np.packbits(right[0])).all() and z['n_test'] == 1003
    got = R.read_correct(tmp_path, {**m, 'correct': hashlib.sha256(raw).hexdigest()})
    assert (got['accuracy'] == right[0]).all() and (got['gradient', 'corner', 'morf'] == right).all() and (got['gradient', 'road', 'lerf'] == right[1:2]).all()
    assert R.read_correct(tmp_path, m) is None  # a run of an earlier version
    with pytest.raises(BadInput, match='levels x 1003'): R.pack_correct(right[0], {('gradient', 'corner', 'morf'): right[:, :9]})

@pytest.mark.parametrize('change,word', [(lambda m: m.update(accuracy=.5), 'another accuracy'), (lambda m: m.update(n_test=1002), '1003 images instead of 1002'), (lambda m: m['masking'].clear(), 'another curve'),
    (lambda m: m['masking']['gradient']['accuracy'].pop(), 'another curve'), (lambda m: m['masking']['gradient']['accuracy'].__setitem__(1, .5), 'another curve gradient/corner/morf'), (lambda m: m.update(correct='0'*64), 'altered')])
def test_answers_that_do_not_add_up_are_not_used(tmp_path, change, word):
    import hashlib
    _, m, raw = some_answers()
    m['correct'] = hashlib.sha256(raw).hexdigest()
    (tmp_path/'correct.npz').write_bytes(raw)
    assert R.read_correct(tmp_path, m)
    change(m)
    with pytest.raises(BadInput, match=f"correct.npz of run {tmp_path.name} can't be used .*{word}"): R.read_correct(tmp_path, m)

def test_answers_that_are_missing_cut_off_or_pickles(tmp_path):
    import hashlib, numpy as np
    _, m, raw = some_answers()
    def refused(data, word):
        (tmp_path/'correct.npz').write_bytes(data)
        with pytest.raises(BadInput, match=word): R.read_correct(tmp_path, {**m, 'correct': hashlib.sha256(data).hexdigest()})
    with pytest.raises(BadInput, match='No such file'): R.read_correct(tmp_path, {**m, 'correct': 'x'})
    refused(raw[:200], "can't be used")
    buffer = R.io.BytesIO(); np.savez(buffer, n_test=np.array([object()], object), accuracy=0)
    refused(buffer.getvalue(), "can't be used")
    refused(R.pack_correct([], {}), '0 images instead of 1003')

KEEP = "import numpy as np\nfrom qisal.run import pack_correct\n(here/'correct.npz').write_bytes(pack_correct(np.arange(1000) < %d, {}))"

def test_a_run_seals_its_answers(tmp_path, out, data):
    m = R.run_one(SPEC, out, make_template(tmp_path/'t.ipynb', KEEP % 500, data=data))
    assert R.read_correct(folder(out), m)['accuracy'].sum() == 500 and len(m['correct']) == 64 and R.read_metrics(folder(out)) == m

def test_a_run_whose_answers_are_not_its_own_fails(tmp_path, out, data):
    with pytest.raises(R.RunFailed, match='another accuracy'): R.run_one(SPEC, out, make_template(tmp_path/'t.ipynb', KEEP % 499, data=data))
    assert not (folder(out)/'metrics.json').exists()


# ---------------------------------------------------------------- names are text

def test_braces_in_paths_are_no_places_for_parameters(tmp_path, data):
    odd = tmp_path/'t {bits} {nothing}'
    odd.mkdir()
    out = odd/'o {seed} {} {{x}}'
    m = R.run_one(SPEC, out, make_template(odd/'{seed}.ipynb', data=data))
    assert m['accuracy'] == .5 and (folder(out)/'run.ipynb').exists() and sorted(o.name for o in odd.iterdir()) == ['o {seed} {} {{x}}', '{seed}.ipynb']
    assert [o.name for o in tmp_path.iterdir()] == [odd.name]

def test_a_notebook_that_is_filled_in_a_folder_with_braces(tmp_path):
    cell = nbformat.v4.new_code_cell("x = 1", metadata=dict(tags=['parameters']))
    (tmp_path/'{x} {y}').mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("import os; print(os.getcwd())")]), tmp_path/'{x} {y}'/'{x}.ipynb')
    nb = R.fill_notebook(tmp_path/'{x} {y}'/'{x}.ipynb', dict(x=2), tmp_path/'{x} {y}')
    assert nb['cells'][-1]['outputs'][0]['text'] in ([f"{tmp_path/'{x} {y}'}\n"], f"{tmp_path/'{x} {y}'}\n")

def test_names_that_are_no_utf8_are_refused_before_anything(tmp_path, template):
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/Stra\xdfe')
    with pytest.raises(BadInput, match=r'output folder .*Stra\\udcdfe. is not UTF-8 text .*rename it'): R.run_one(SPEC, odd, template)
    assert not os.path.exists(odd)
    photos = tmp_path/'photos'
    from PIL import Image
    for name in (b'b', b'Stra\xdfe'):
        where = os.fsdecode(os.fsencode(photos) + b'/' + name)
        os.makedirs(where)
        for i in range(9): Image.new('L', (28, 28), 20*i).save(f'{where}/{i}.png')
    with pytest.raises(BadInput, match=r'Stra\\udcdfe'): R.run_study([RunSpec(dataset=f'folder:{photos}', epochs=1)], tmp_path/'o', 1, template=template)
    with pytest.raises(BadInput, match=r'Stra\\udcdfe'): R.run_study([RunSpec(dataset=f'folder:{os.fsdecode(os.fsencode(photos) + b"/Stra" + bytes([0xdf]) + b"e")}', epochs=1)], tmp_path/'o', 1, template=template)
    assert not list((tmp_path/'o').rglob('spec.json'))
    assert R.check_text('x', 'für 数字 $$ {seed}') == 'für 数字 $$ {seed}'

def test_a_lone_value_is_one_value():
    import numpy as np
    g = R.grid('smoke', datasets='mnist', bits='32', guided='off', seeds=3)
    assert [(o.dataset, o.bits, o.guided, o.seed) for o in g] == [('mnist', '32', False, 3)]
    assert R.grid('smoke', bits=4, guided=True) == R.grid('smoke', bits=['4'], guided=['on']) == R.grid('smoke', bits=[4.], guided=[np.bool_(True)]) == R.grid('smoke', bits='4.0', guided=np.bool_(True))


# ---------------------------------------------------------------- whatever the locale

LOCALES = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

def in_c_locale(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, encoding='utf-8', env={**os.environ, **LOCALES}, timeout=300)

def test_studies_are_read_and_written_as_utf8(tmp_path, data):
    "The kernel writes and prints what no ASCII holds, under a locale that knows nothing else."
    t = make_template(tmp_path/'t.ipynb', "print('für 数字')\nos.write(2, 'schön'.encode())", data=data)
    nb = nbformat.read(t, 4)
    nb.cells[-1].source = nb.cells[-1].source.replace('provenance={}', "provenance=dict(who='für 数字')").replace("json.dumps(result)", "json.dumps(result, ensure_ascii=False), encoding='utf-8'")
    nbformat.write(nb, t)
    r = in_c_locale(f'''from qisal import run as R
specs = R.grid('smoke', bits='4', guided=False, epochs=1)
df = R.run_study(specs, {str(tmp_path/"o")!r}, 1, template={str(t)!r}, say=lambda o: None)
print(list(df.status), ascii(R.load_runs({str(tmp_path/"o")!r})[0]['metrics']['provenance']['who']))''')
    assert r.returncode == 0 and r.stdout.split('\n')[0] == "['done'] 'f\\xfcr \\u6570\\u5b57'", r.stderr[-800:]
    run = next((tmp_path/'o'/'runs').iterdir())
    assert 'für 数字' in (run/'run.ipynb').read_text(encoding='utf-8') and 'schön' in (run/'log.txt').read_text(encoding='utf-8')

def test_a_name_that_the_locale_cant_read_is_told_from_one_that_is_no_text(tmp_path):
    r = in_c_locale(f'''import os
from qisal.core import check_text
try: check_text('the output folder', os.fsdecode({os.fsencode("für")!r}))
except Exception as e: print(type(e).__name__, ascii(str(e)))''')
    assert r.stdout.startswith("BadInput ") and "set PYTHONUTF8=1" in r.stdout, r.stderr[-800:]


def test_deeply_nested_files_are_damaged_files(tmp_path, out):
    deep = '['*100_000 + ']'*100_000
    folder(out).mkdir(parents=True)
    (folder(out)/'metrics.json').write_text(deep, encoding='utf-8')
    assert R.read_metrics(folder(out)) is None
    (tmp_path/'t.ipynb').write_text(deep, encoding='utf-8')
    with pytest.raises(BadInput, match='no notebook'): R.check_template(tmp_path/'t.ipynb')


# ---------------------------------------------------------------- the real template

def changed_template(path, after, code):
    "The real template with one cell more."
    nb = nbformat.read(R.check_template(), 4)
    i = next(i for i, c in enumerate(nb.cells) if after in c.source)
    nb.cells.insert(i + 1, nbformat.v4.new_code_cell(code))
    nbformat.write(nb, path)
    return path

@pytest.fixture(scope='module')
def drawn_blank(tmp_path_factory):
    "A study of one run on a small folder of images with odd class names, in which no figure can be drawn."
    from PIL import Image
    tmp = tmp_path_factory.mktemp('real')
    for k, name in enumerate(('$$', '$1', '数')):
        (tmp/'photos {seed}'/name).mkdir(parents=True)
        for i in range(15): Image.new('L', (28, 28), (37*i + 80*k) % 256).save(tmp/'photos {seed}'/name/f'{i}.png')
    t = changed_template(tmp/'t.ipynb', 'def keep_figure', "from matplotlib.figure import Figure\ndef no(*a, **k): raise RuntimeError('no ink')\nFigure.savefig = no")
    spec = RunSpec(dataset=f'folder:{tmp/"photos {seed}"}', epochs=1, bits=4, attributions=['gradient'])
    return tmp, spec, R.run_one(spec, tmp/'o {seed}', t)

def test_figures_that_cant_be_drawn_cost_no_numbers(drawn_blank):
    from qisal.report import make_report
    tmp, spec, m = drawn_blank
    assert set(m['failed_figures']) == {'batch', 'filmstrip', 'history', 'masking', 'saliency', 'alphas'} and set(m['failed_figures'].values()) == {'RuntimeError: no ink'}
    where = tmp/'o {seed}'/'runs'/spec.run_id
    log, page = (where/'log.txt').read_text(encoding='utf-8'), make_report(tmp/'o {seed}').read_text(encoding='utf-8')
    assert all(f"The figure '{o}' could not be drawn (RuntimeError: no ink)" in log for o in m['failed_figures'])
    assert 'could not be drawn' in page and 'filmstrip' in page and 'no ink' in page and all(f'<th scope="row">{o}</th>' in page for o in ('$$', '$1', '数'))
    assert (where/'run.ipynb').is_file() and (where/'maps.npz').is_file() and not list(where.rglob('*.png'))

def test_the_real_template_keeps_every_answer_and_the_random_control(drawn_blank):
    tmp, spec, m = drawn_blank
    right = R.read_correct(tmp/'o {seed}'/'runs'/spec.run_id, m)
    assert set(right) == {'accuracy', ('gradient', 'corner', 'morf'), ('gradient', 'road', 'morf'), ('gradient', 'road', 'lerf'), ('random', 'corner', 'morf'), ('random', 'road', 'morf')}
    assert m['classes'] == ['$$', '$1', '数'] and m['masking']['random']['blank'] == 0 and set(m['masking']) == {'gradient', 'random'} and len(right['accuracy']) == m['n_test'] == 9

@pytest.mark.parametrize('name', ['90_experiment', '91_study', '80_benchmark'])
def test_unknown_parameters_of_notebooks_are_refused(tmp_path, name):
    "papermill itself only warns. Only the first cells are executed: they must refuse."
    import papermill
    nb = nbformat.read(Path(R.check_template()).parent/f'{name}.ipynb', 4)
    first = next(i for i, c in enumerate(nb.cells) if 'check_parameters(' in c.source)
    nb.cells = nb.cells[:first + 1]
    nbformat.write(nb, tmp_path/'t.ipynb')
    with pytest.raises(papermill.PapermillExecutionError, match="parameter 'bitz' is unknown"): papermill.execute_notebook(str(tmp_path/'t.ipynb'), None, dict(bitz=4), progress_bar=False, kernel_name='python3', language='python')
    if name == '90_experiment':
        papermill.execute_notebook(str(tmp_path/'t.ipynb'), str(tmp_path/'o.ipynb'), dict(bits=4, out=str(tmp_path/'new'/'folder')), progress_bar=False, kernel_name='python3', language='python')
        assert (tmp_path/'new'/'folder').is_dir() and 'mnist-small_cnn-b4-guided-s0' in (tmp_path/'o.ipynb').read_text(encoding='utf-8')
