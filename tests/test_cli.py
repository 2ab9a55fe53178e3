"""The `qisal` command as a user runs it: exit status, one clear line for bad input, nothing half-written."""
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from test_run import RESULTS, SPEC, data, folder, make_template, spec_file, template  # noqa: F401 (fixtures)
from qisal.core import BadInput, RunSpec

def qisal(*args, cwd=None, **env):
    return subprocess.run([sys.executable, '-m', 'qisal.cli', *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=900,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, encoding='utf-8')

def refused(r, *words):
    assert r.returncode == 2, r.stdout + r.stderr
    assert r.stdout == '' and r.stderr.startswith('qisal: error: ') and r.stderr.count('\n') == 1, r.stderr
    for o in words: assert o in r.stderr, r.stderr

COMMANDS = ('study', 'run', 'report', 'data', 'predict', 'explain', 'export', 'bench')

def test_help_lists_all_commands():
    r = qisal('--help')
    assert r.returncode == 0 and all(o in r.stdout for o in COMMANDS)

def test_version():
    import qisal as package
    r = qisal('--version')
    assert (r.returncode, r.stdout, r.stderr) == (0, f'qisal {package.__version__}\n', '')

def test_help_of_bench_names_every_group_of_rows():
    from qisal.bench import GROUPS
    text = ' '.join(qisal('bench', '--help').stdout.split())
    assert f"Groups of rows: {', '.join(GROUPS)}." in text

@pytest.mark.parametrize('name', ['study', 'run'])
def test_what_messages_advise_can_be_set(name):
    text = qisal(name, '--help').stdout
    assert all(o in text for o in ('--size', '--batch-size', '--lr', '--background'))

@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command_has_an_example(name):
    r = qisal(name, '--help')
    assert r.returncode == 0 and 'Example' in r.stdout and f'qisal {name} ' in r.stdout

def test_help_imports_nothing_heavy():
    code = "import sys\nfrom qisal import cli\ntry: cli.app(['study', '--help'])\nexcept SystemExit: pass\nprint([o for o in ('torch', 'fastai', 'pandas', 'numpy', 'matplotlib', 'papermill') if o in sys.modules])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, encoding='utf-8')
    assert r.stdout.splitlines()[-1] == '[]'

def test_no_command_shows_help(): assert 'Commands:' in (r := qisal()).stdout + r.stderr and r.returncode == 2

@pytest.mark.parametrize('args,words', [
    (['--profile', 'smol'], ['profile', 'smol', 'smoke, quick, paper']), (['--datasets', 'mnits'], ['mnits', "Did you mean 'mnist'"]), (['--bits', '32,5'], ["'5'", 'w2a4']),
    (['--bits', '4,,2'], ['--bits', 'empty element']), (['--bits', ''], ['--bits']), (['--guided', 'maybe'], ['maybe', 'off, on']), (['--seeds', '-1'], ['seed is -1']),
    (['--seeds', 'a'], ['--seeds', "'a'", 'whole numbers']), (['--arch', 'vgg'], ['vgg', 'resnet20']), (['--epochs', '0'], ['epochs is 0']), (['--epochs', '-3'], ['epochs is -3']),
    (['--epochs', 'x'], ['--epochs']), (['--jobs', '0'], ['jobs is 0']), (['--jobs', '-2'], ['jobs is -2']), (['--threads', '0'], ['threads is 0']), (['--frac', '0'], ['frac is 0']),
    (['--frac', '1'], ['frac is 1']), (['--mode', 'quick'], ['mode', 'quick', 'exact, fast']), (['--frac', 'nan'], ['frac']), (['--n-train', '0'], ['n_train is 0']), (['--n-train', '2000000'], ['n_train is 2000000']), (['--attributions', 'lime'], ['lime', 'gradient']),
    (['--template', 'none.ipynb'], ['none.ipynb']), (['--size', '64'], ['size is for folder:PATH only']), (['--batch-size', '0'], ['batch_size is 0']), (['--lr', '0'], ['lr is 0']), (['--epoch', '3'], ['--epoch']), (['--datasets', 'folder:none'], ['none']), (['extra'], ['extra'])], ids=lambda o: ' '.join(o) if o and o[0][:1] == '-' else '')
def test_study_refuses_before_anything(tmp_path, args, words):
    refused(qisal('study', '--out', tmp_path/'study', *args), *words)
    assert not list(tmp_path.rglob('runs/*')) and not list(tmp_path.rglob('manifest.json'))

@pytest.mark.parametrize('args', [['smok'], ['folder:none'], ['cifar10', '--sample']], ids=str)
def test_data_refuses(args): refused(qisal('data', *args))

def test_data_says_what_it_is():
    r = qisal('data', 'mnist', '--sample')
    assert r.returncode == 0 and '2000 training and 1000 test images of 28 x 28 x 1' in r.stdout and len(re.findall(r'sha256 [0-9a-f]{64}\n', r.stdout)) == 4

def test_data_of_a_folder_with_a_corrupt_image(tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(4): Image.new('L', (32, 32), 60*i).save(tmp_path/c/f'{i}.png')
    assert qisal('data', f'folder:{tmp_path}').returncode == 0
    (tmp_path/'b'/'3.png').write_bytes((tmp_path/'b'/'2.png').read_bytes()[:40])
    refused(qisal('data', f'folder:{tmp_path}'), '3.png')

def test_report_refuses(tmp_path):
    for more in ((), ('--measure',)):
        refused(qisal('report', tmp_path/'none', *more), 'none')
        refused(qisal('report', tmp_path, *more))
    assert not list(tmp_path.iterdir())

def test_run_refuses(tmp_path, template):  # noqa: F811
    out = tmp_path/'out'
    refused(qisal('run', '--out', out), '--spec')
    refused(qisal('run', '--spec', tmp_path/'none.json', '--out', out), 'none.json')
    for text, word in (('{', 'no valid JSON'), ('[]', 'JSON object'), ('{"bitz": "4"}', "'bitz' is unknown"), ('{"bits": "7"}', "bits '7'"), ('{"bits": 4.5}', "bits '4.5'"), ('{"size": 64}', 'size is for folder:PATH only')):
        (tmp_path/'s.json').write_text(text, encoding='utf-8')
        refused(qisal('run', '--spec', tmp_path/'s.json', '--out', out, '--template', template), word)
    assert not out.exists()
    refused(qisal('run', '--spec', spec_file(tmp_path), '--out', template/'x', '--template', template), 'is a file')

def test_run_is_done_once(tmp_path, template):  # noqa: F811
    cmd = ['run', '--spec', spec_file(tmp_path), '--out', tmp_path/'out', '--template', template]
    first = qisal(*cmd)
    assert first.returncode == 0 and first.stdout == f'{SPEC.run_id}: accuracy 50.00%\n' and first.stderr == ''
    before = (folder(tmp_path/'out')/'run.ipynb').stat().st_mtime_ns
    again = qisal(*cmd)
    assert again.returncode == 0 and again.stdout == first.stdout and (folder(tmp_path/'out')/'run.ipynb').stat().st_mtime_ns == before

def test_run_takes_other_values_than_its_spec(tmp_path, template):  # noqa: F811
    from dataclasses import replace
    r = qisal('run', '--spec', spec_file(tmp_path), '--out', tmp_path/'out', '--template', template, '--batch-size', '32', '--lr', '.01')
    assert r.returncode == 0 and r.stdout.startswith(replace(SPEC, batch_size=32, lr=.01).run_id), r.stderr

def test_study_of_a_tiny_folder_trains(tmp_path):
    "Three images a class: the smallest folder that is taken, with guidance and its film strip, a batch of one."
    from qisal.run import read_metrics
    for c in 'ab':
        (tmp_path/'photos'/c).mkdir(parents=True)
        for i in range(3): Image.fromarray(np.random.RandomState(i).randint(0, 256, (50, 40, 3), np.uint8)).save(tmp_path/'photos'/c/f'{i}.png')
    args = 'study --datasets folder:photos --bits 4.0 --guided on --epochs 1 --no-measure --jobs 1 --out o'.split()
    for more, size in ((), 40), (('--size', 24, '--batch-size', 1, '--lr', .01), 24):
        r = qisal(*args, *more, cwd=tmp_path)
        assert r.returncode == 0, r.stdout + r.stderr
    runs = [read_metrics(o)['spec'] for o in (tmp_path/'o'/'runs').iterdir()]
    assert sorted((o['size'] or 0, o['batch_size'] or 0, o['lr'], o['bits']) for o in runs) == [(0, 0, .003, '4'), (24, 1, .01, '4')]

def test_failed_run_has_exit_status_1(tmp_path, data):  # noqa: F811
    bad = make_template(tmp_path/'t.ipynb', '1/0', data=data)
    r = qisal('run', '--spec', spec_file(tmp_path), '--out', tmp_path/'out', '--template', bad)
    assert r.returncode == 1 and 'ZeroDivisionError' in r.stderr and 'Traceback' not in r.stderr

def real_study(tmp_path, *args): return qisal('study', '--bits', '32', '--guided', 'off', '--epochs', '1', '--out', 'mine', *args, cwd=tmp_path)

def test_nan_in_training_ends_the_run_as_failed_with_the_epoch(tmp_path):
    "The real template and a learning rate that no network survives."
    spec = RunSpec(sample=True, epochs=2, lr=1e30)
    r = qisal('run', '--spec', spec_file(tmp_path, spec), '--out', tmp_path/'out')
    assert r.returncode == 1 and 'TrainingFailed' in r.stderr and 'epoch 1' in r.stderr
    error = json.loads((folder(tmp_path/'out', spec)/'error.json').read_text(encoding='utf-8'))
    assert error['type'] == 'TrainingFailed' and error['epoch'] == 1 and 'batch' in error['message']

@pytest.fixture(scope='module')
def studied(tmp_path_factory):
    "One real run with the real template, from another working directory."
    cwd = tmp_path_factory.mktemp('elsewhere')
    return cwd, real_study(cwd)

def test_real_study_from_another_folder(studied):
    cwd, r = studied
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.rstrip().endswith('report: ' + os.path.join('mine', 'report.html')) and (cwd/'mine'/'report.html').stat().st_size > 10000
    assert re.search(r'mnist +small_cnn +32 +off +0 ', r.stdout)
    run, = (cwd/'mine'/'runs').iterdir()
    assert {'spec.json', 'run.ipynb', 'metrics.json', 'curves.csv', 'history.csv', 'maps.npz', 'figures', 'model', 'log.txt'} <= {o.name for o in run.iterdir()}
    m = json.loads((run/'metrics.json').read_text(encoding='utf-8'))
    assert m['accuracy'] > .6 and m['n_test'] == 1000 and m['masking']['gradient']['accuracy'][0] == m['accuracy'] and m['masking']['gradient']['auc'] < m['masking']['random']['auc']
    assert str(cwd) not in (run/'run.ipynb').read_text(encoding='utf-8') + (run/'metrics.json').read_text(encoding='utf-8')
    z = np.load(run/'maps.npz', allow_pickle=False)
    assert z['images'].shape == (10, 28, 28, 1) and z['images'].dtype == np.uint8 and z['maps'].shape == (10, 28, 28) and z['maps'].dtype == np.float32
    assert list(z['labels']) == list(range(10)) and z['pred'].shape == (10,)

def test_real_study_measures_its_files(studied):
    cwd, _ = studied
    run, = (cwd/'mine'/'runs').iterdir()
    s = json.loads((run/'shipped.json').read_text(encoding='utf-8'))
    assert s['kind'] == 'float' and s['n_test'] == 1000 and s['differ'] <= 1 and abs(s['accuracy'] - json.loads((run/'metrics.json').read_text(encoding='utf-8'))['accuracy']) <= .001
    assert [o['bits'] for o in s['after_training']] == ['8', '8', '4', '2'] and str(cwd) not in (run/'shipped.json').read_text(encoding='utf-8')
    page = (cwd/'mine'/'report.html').read_text(encoding='utf-8')
    assert 'id="ships"' in page and 'id="after"' in page
    header, row = (cwd/'mine'/'summary.csv').read_text(encoding='utf-8').splitlines()
    assert 'file_bytes,file_accuracy,latency_1,latency_256' in header and f",{s['bytes']['onnx']},{s['accuracy']}," in row

def test_report_measures_what_is_missing(studied, tmp_path):
    "Gone: measured again; there: left alone; broken: said, in one line, and the report is written all the same."
    cwd, _ = studied
    shutil.copytree(cwd/'mine', tmp_path/'mine')
    run, = (tmp_path/'mine'/'runs').iterdir()
    (run/'shipped.json').unlink()
    r = qisal('report', 'mine', cwd=tmp_path)
    assert r.returncode == 0 and not (run/'shipped.json').exists() and 'were not measured as files' in (tmp_path/'mine'/'report.html').read_text(encoding='utf-8')
    r = qisal('report', 'mine', '--measure', cwd=tmp_path)
    assert r.returncode == 0 and 'file 4,800 kB' in r.stdout and 'id="after"' in (tmp_path/'mine'/'report.html').read_text(encoding='utf-8'), r.stdout + r.stderr
    before = (run/'shipped.json').stat().st_mtime_ns
    r = qisal('report', 'mine', '--measure', cwd=tmp_path)
    assert r.returncode == 0 and 'file 4,800 kB' not in r.stdout and (run/'shipped.json').stat().st_mtime_ns == before
    (run/'shipped.json').unlink()
    os.truncate(run/'model'/'model.safetensors', 1000)
    r = qisal('report', 'mine', '--measure', cwd=tmp_path)
    assert r.returncode == 1 and f'qisal: could not be measured: {run.name}' in r.stderr and 'truncated' in r.stdout and 'Traceback' not in r.stderr and 'report: ' in r.stdout
    assert 'could not be measured: model.safetensors' in (tmp_path/'mine'/'report.html').read_text(encoding='utf-8')
    shutil.rmtree(run/'model'); (run/'shipped.json').unlink()
    r = qisal('report', 'mine', '--measure', cwd=tmp_path)
    assert r.returncode == 0 and f'for want of a model folder: {run.name}' in r.stderr

def test_second_study_repeats_nothing(studied):
    cwd, _ = studied
    files = {o: o.stat().st_mtime_ns for o in (cwd/'mine'/'runs').rglob('*') if o.is_file()}
    r = real_study(cwd)
    assert r.returncode == 0 and 'done before' in r.stdout and {o: o.stat().st_mtime_ns for o in files} == files

def test_study_with_a_failed_run_has_exit_status_1_and_a_report(tmp_path, data):  # noqa: F811
    bad = make_template(tmp_path/'t.ipynb', "if bits == '4': 1/0", data=data)
    r = qisal('study', '--bits', '32,4', '--guided', 'off', '--epochs', '1', '--out', 'x', '--template', bad, cwd=tmp_path)
    assert r.returncode == 1 and '1 of 2 runs failed' in r.stderr and 'Traceback' not in r.stderr, r.stdout + r.stderr
    assert (tmp_path/'x'/'report.html').exists()

def test_explain(studied, tmp_path):
    cwd, _ = studied
    run, = (cwd/'mine'/'runs').iterdir()
    model, z = run/'model', np.load(run/'maps.npz', allow_pickle=False)
    right = int(np.flatnonzero(z['pred'] == z['labels'])[0])
    Image.fromarray(z['images'][right, ..., 0]).save(tmp_path/'digit.png')
    r = qisal('explain', tmp_path/'digit.png', '--model', model, '--out', tmp_path/'o.png')
    assert r.returncode == 0 and re.fullmatch(rf"prediction: {z['labels'][right]}\n  {z['labels'][right]}: [\d.]+%\n(  \d: [\d.]+%\n){{2}}overlay: .*o.png\n", r.stdout), r.stdout + r.stderr
    assert min(Image.open(tmp_path/'o.png').size) > 200
    Image.fromarray(z['images'][right, ..., 0]).convert('RGB').resize((90, 90)).save(tmp_path/'big.png')  # another size and mode
    assert qisal('explain', tmp_path/'big.png', '--model', model, '--out', tmp_path/'o.png').stdout.startswith('prediction: ')

def test_explain_refuses(studied, tmp_path):
    cwd, _ = studied
    run, = (cwd/'mine'/'runs').iterdir()
    Image.new('L', (28, 28)).save(tmp_path/'ok.png')
    Image.new('I;16', (28, 28)).save(tmp_path/'deep.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'ok.png').read_bytes()[:50])
    (tmp_path/'text.png').write_text('no image', encoding='utf-8')
    for name in ('none.png', 'cut.png', 'text.png', 'deep.png'):
        refused(qisal('explain', tmp_path/name, '--model', run/'model', '--out', tmp_path/'o.png'), name)
    refused(qisal('explain', tmp_path/'ok.png', '--model', tmp_path, '--out', tmp_path/'o.png'))
    refused(qisal('explain', tmp_path/'ok.png', '--model', run/'model', '--out', tmp_path/'o.jpg'), '.png')
    refused(qisal('explain', tmp_path/'ok.png', '--model', run/'model', '--out', tmp_path/'no'/'o.png'), 'no folder')
    refused(qisal('explain', tmp_path/'ok.png', '--model', run/'model', '--out', tmp_path/'o.png', '--runtime', 'onnxruntime'), 'no model.onnx', 'qisal export')
    refused(qisal('explain', tmp_path/'ok.png', '--model', run/'model', '--out', tmp_path/'o.png', '--runtime', 'tf'), "runtime 'tf'", 'onnxruntime, torch')
    assert not (tmp_path/'o.png').exists()


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    "An exported folder, and three images: one that fits, a larger one in colour, one that is damaged."
    import torch
    from qisal.data import get_dls, sample_arrays
    from qisal.deploy import export_model
    from qisal.models import lenet5
    from qisal.quant import bake, bit_policy, calibrate, convert
    torch.manual_seed(0)
    cwd, dls, x = tmp_path_factory.mktemp('shipped'), get_dls('mnist', sample=True, device='cpu'), sample_arrays('mnist').x_test
    xb = dls.one_batch()[0]
    net = calibrate(convert(lenet5(), bit_policy('4'), xb, input_range=dls.train.input_range), xb)
    export_model(bake(net), cwd/'small', classes=dls.vocab, n_in=1, size=28, stats=dls.stats)
    Image.fromarray(x[0, ..., 0]).save(cwd/'a.png')
    Image.fromarray(x[1, ..., 0]).convert('RGB').resize((60, 50)).save(cwd/'b.jpg')
    (cwd/'cut.png').write_bytes((cwd/'a.png').read_bytes()[:60])
    return cwd

def test_predict(shipped):
    from qisal.serve import predict
    def said(*args): return qisal('predict', *args, '--model', 'small', cwd=shipped, PYTHONPATH=str(Path(__file__).parents[1]))
    p = predict(shipped/'small', [shipped/'a.png', shipped/'b.jpg'], resize=True)
    want = [f'{f}\t{n}\t{q:.4f}' for f, n, q in zip(('a.png', 'b.jpg'), p.labels, p.probs.max(1))]
    for args, lines in ((('a.png',), want[:1]), (('a.png', 'b.jpg', '--resize'), want), (('a.png', '--runtime', 'torch'), want[:1])):
        r = said(*args)
        assert (r.returncode, r.stderr, r.stdout.splitlines()) == (0, '', lines), r.stdout + r.stderr
    refused(said('a.png', 'b.jpg'), 'b.jpg', '60 x 50', '28 x 28', '--resize')
    refused(said('a.png', 'cut.png', '--resize'), 'cut.png')
    refused(said('nowhere.png'), 'nowhere.png')
    refused(said('a.png', '--runtime', 'tf'), "runtime 'tf'")
    refused(said(), 'images')
    refused(qisal('predict', 'a.png', '--model', 'none', cwd=shipped, PYTHONPATH=str(Path(__file__).parents[1])), 'none', 'no folder')

def test_explain_in_onnxruntime(shipped):
    r = qisal('explain', 'b.jpg', '--model', 'small', '--runtime', 'onnxruntime', cwd=shipped, PYTHONPATH=str(Path(__file__).parents[1]))
    assert r.returncode == 0 and re.fullmatch(r'prediction: \d\n(  \d: [\d.]+%\n){3}overlay: overlay.png\n', r.stdout), r.stdout + r.stderr
    assert min(Image.open(shipped/'overlay.png').size) > 200

def test_export_of_a_run_and_of_a_model_folder(tmp_path):
    import torch
    from qisal.data import get_dls
    from qisal.deploy import load_model, save_model
    from qisal.models import lenet5
    from qisal.quant import bake, bit_policy, convert
    torch.manual_seed(0)
    dls = get_dls('mnist', sample=True)
    xb = dls.one_batch()[0]
    net = convert(lenet5(), bit_policy('2'), xb, input_range=dls.train.input_range).eval()
    (tmp_path/'run').mkdir()
    save_model(net, tmp_path/'run'/'model', classes=dls.vocab, n_in=1, size=28, stats=dls.stats)
    for source in ('run', 'run/model'):
        r = qisal('export', source, '--out', 'small', cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
        assert r.returncode == 0 and 'model.onnx' in r.stdout and 'model: small' in r.stdout, r.stderr
    with torch.no_grad(): assert torch.equal(load_model(tmp_path/'small')[0](xb), bake(net)(xb))
    for source, folder in (('run', 'run/export'), ('run/model/', 'run/model-export')):  # where it goes unless --out says otherwise
        r = qisal('export', source, '--to', 'onnx', cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
        assert r.returncode == 0 and f'model: {folder}' in r.stdout, r.stderr
        assert {o.name for o in (tmp_path/folder).iterdir()} == {'README.md', 'config.json', 'model.onnx'}

@pytest.mark.parametrize('source,args,words', [('nowhere', [], ['nowhere']), ('float', [], ['float network', 'qisal study --bits 4', 'PACTCallback']), ('low', ['--opset', '20'], ['opset is 20']), ('low', ['--to', 'pickle'], ['pickle', 'packed']), ('empty', [], ['empty'])], ids=str)
def test_export_refuses_and_leaves_nothing(tmp_path, source, args, words):
    from qisal.deploy import save_model
    import torch
    from qisal.models import lenet5
    from qisal.quant import bit_policy, convert
    facts = dict(classes=list('0123456789'), n_in=1, size=28, stats=([.5], [.5]))
    save_model(lenet5(), tmp_path/'float', **facts)
    save_model(convert(lenet5(), bit_policy('2'), torch.randn(4, 1, 28, 28)), tmp_path/'low', **facts)
    (tmp_path/'empty').mkdir()
    refused(qisal('export', tmp_path/source, '--out', tmp_path/'out', *args), *words)
    assert not (tmp_path/'out').exists()
