"""The benchmark runs every row and reports what it found; it judges nothing, and no test here looks at a time."""
import json, re
from pathlib import Path

import nbformat, papermill, pytest
from PIL import Image
from test_cli import qisal, refused

from qisal.bench import GROUPS, PEERS, PER_CYCLE, ROWS, SETTINGS, byte_floor, deploy_files, first_prediction, in_words, instruction_set, node_seconds, products_only, results_frame, rested, run_benchmark, weight_bytes
from qisal.core import BadInput


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Every group but `study`, at a small size, with one peer that is there and broken."
    out, fake = tmp_path_factory.mktemp('bench'), tmp_path_factory.mktemp('peers')/'brevitas'
    fake.mkdir()
    (fake/'__init__.py').write_text("", encoding='utf-8')
    (fake/'nn.py').write_text("raise ImportError('this torch is too new for me')", encoding='utf-8')
    groups = ','.join(o for o in GROUPS if o != 'study')
    r = qisal('bench', '--rows', groups, '--batch', 8, '--repeats', 1, '--out', out/'results', PYTHONPATH=f'{fake.parent}:{Path(__file__).parents[1]}')
    assert r.returncode == 0, r.stderr
    return out/'results', r


def test_every_row_is_measured_once(small):
    out, r = small
    result = json.loads((out/'bench.json').read_text(encoding='utf-8'))
    assert set(result['rows']) == {k for k, v in ROWS.items() if v.group != 'study'}
    for name, row in result['rows'].items():
        assert row['title'] in r.stdout
        if name in PEERS: continue
        if name == 'pact' and row['value'] is None: assert row['why'] == 'no C++ compiler'
        else: assert row['low'] <= row['value'] <= row['high'] and row['value'] > 0 and row['n'] >= 1
    assert result['rows']['fp32']['value'] == 1 and result['parameters'] == dict(rows=[o for o in GROUPS if o != 'study'], batch=8, repeats=1, n_threads=2)
    assert len(result['ways']) >= 6 and len(result['scaling']) == 5 and result['provenance']['versions']['torch']


def test_a_peer_that_is_missing_is_a_row_and_no_error(small):
    rows = json.loads((small[0]/'bench.json').read_text(encoding='utf-8'))['rows']
    assert rows['brevitas']['value'] is None and 'fails: ImportError: this torch is too new for me' in rows['brevitas']['why']
    for o in ('fms', 'fasterai'): assert rows[o]['why'] == 'not installed' or rows[o]['value'] > 0
    assert 'too new for me' in small[1].stdout


def test_memory_of_a_masking_curve_is_flat_in_the_number_of_images(small):
    flat = json.loads((small[0]/'bench.json').read_text(encoding='utf-8'))['scaling']['Memory of a masking curve']
    assert max(flat['series']['10 levels']) < 1.05*min(flat['series']['10 levels'])


def test_the_notebook_and_the_figures_are_kept(small):
    out, _ = small
    assert {o.name for o in out.iterdir()} == {'bench.json', 'bench.png', 'deploy.png', 'scaling.png', 'benchmark.ipynb'}
    for o in ('bench.png', 'deploy.png', 'scaling.png'): assert Image.open(out/o).size[0] >= 900
    text = (out/'benchmark.ipynb').read_text(encoding='utf-8')
    nbformat.validate(nbformat.reads(text, 4))
    plain = re.sub(r'"image/png": "[^"]*"', '', text)
    assert str(out) not in plain and '/tmp' not in plain and str(Path(__file__).parents[1]) not in plain


@pytest.mark.parametrize('args,words', [(['--rows', 'stepz'], ["rows 'stepz'", "Did you mean 'steps'"]), (['--rows', 'steps,,memory'], ["rows ''"]), (['--batch', '1'], ['batch is 1']),
    (['--batch', '5000'], ['batch is 5000']), (['--repeats', '0'], ['repeats is 0']), (['--repeats', 'x'], ['--repeats']), (['--threads', '0'], ['threads is 0'])], ids=str)
def test_bad_wishes_are_refused_before_anything(tmp_path, args, words):
    refused(qisal('bench', '--out', tmp_path/'out', *args), *words)
    assert not (tmp_path/'out').exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path/'file').write_text('x', encoding='utf-8')
    for o in ('file', 'file/below'):
        with pytest.raises(BadInput, match='out is .*name another folder'): run_benchmark(tmp_path/o, rows='memory')
    assert (tmp_path/'file').read_text(encoding='utf-8') == 'x'


def test_a_measurement_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    import qisal.bench as module
    cell = nbformat.v4.new_code_cell("rows = ''; batch = 1; repeats = 1; n_threads = 1; out = ''", metadata=dict(tags=['parameters']))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("raise MemoryError('too large')")]), tmp_path/'broken.ipynb')
    monkeypatch.setattr(module, 'asset', lambda *a: tmp_path/'broken.ipynb')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'bench.json').write_text('{"old": 1}', encoding='utf-8')
    with pytest.raises(papermill.PapermillExecutionError, match='too large'): run_benchmark(tmp_path/'out', progress=False)
    assert {o.name: o.read_text(encoding='utf-8') for o in (tmp_path/'out').iterdir()} == {'bench.json': '{"old": 1}'}


def test_the_table_says_what_held():
    m = dict(low=1., high=1.2, seconds=.1, n=3)
    df = results_frame(dict(fp32=dict(m, value=1.), pact=dict(m, value=1.05), guided=dict(m, value=2.6), brevitas=dict(value=None, low=None, high=None, seconds=None, n=0, why='not installed')))
    assert df.held.tolist() == ['', 'yes', 'no', ''] and df.quartiles.tolist()[-1] == 'not installed' and df.measured.tolist() == ['1.00', '1.05', '2.60', '–']


def test_what_ships_has_its_bounds_and_floors(small):
    "Every number of the table of what ships is a row; sizes and floors depend on no clock."
    result = json.loads((small[0]/'bench.json').read_text(encoding='utf-8'))
    rows, floor = result['rows'], byte_floor(instruction_set())
    bounds = dict(zip(SETTINGS, (.55, .55, .60, .75)))
    for k, bound in bounds.items():
        assert rows[f'onnx4_{k}']['bound'] == bound and rows[f'onnx4_{k}']['seconds'] > 0
        for o in ('onnx4', 'onnx2', 'int8', 'resnet20_onnx4', 'resnet20_int8'): assert rows[f'{o}_{k}']['floor'] == floor
        assert 0 < result['profile'][k]['products'] < result['profile'][k]['whole'] and 'QLinearConv 2' in result['profile'][k]['nodes']['4'] and 'Conv 2' in result['profile'][k]['nodes']['float']
    assert [rows[f'eager4_1_{t}']['bound'] for t in (1, 2)] == [.3, .3] and 'eager4_batch_1' not in rows
    for t in (1, 2): assert 0 < rows[f'eager4_1_{t}']['floor'] < floor*20 if floor else rows[f'eager4_1_{t}']['floor'] is None
    assert result['instruction_set'] == instruction_set() and rows['export']['bound'] == 5 and rows['first']['bound'] == .5
    for file in ('onnx', 'safetensors'):
        for bits, part in ((4, 7.7), (2, 15)):
            row = rows[f'{file}{bits}_bytes']
            assert row['bound'] == 1/part and row['floor'] < row['value'] <= row['bound']
            assert rows[f'resnet20_{file}{bits}_bytes']['floor'] < rows[f'resnet20_{file}{bits}_bytes']['value'] < 1/(.7*32/bits)
    assert '1/7.70' in small[1].stdout and '1/15.00' in small[1].stdout


def test_the_files_that_are_timed_are_the_network(tmp_path):
    import numpy as np, torch
    from qisal.deploy import onnx_session
    d = deploy_files(tmp_path, n=32, bits=('4',))
    run = lambda o: onnx_session(d['files'][o]).run(None, {'image': d['images']})[0]
    with torch.no_grad(): want, quantized = d['network'](torch.from_numpy(d['images'])).numpy(), d['quantized']['4'](torch.from_numpy(d['images'])).numpy()
    assert np.abs(run('float') - want).max() < 1e-4 and np.abs(run('4') - quantized).max() < .1*quantized.std()
    assert np.corrcoef(run('4').ravel(), want.ravel())[0, 1] > .9 and np.corrcoef(run('int8').ravel(), want.ravel())[0, 1] > .9
    assert weight_bytes(d['quantized']['4']) == 9*32 + 9*32*64/2 + 9216*128/2 + 1280  # 8, 4, 4 and 8 bits
    np.save(tmp_path/'image.npy', d['pixels'][:1])
    assert 0 < first_prediction(d['folders']['4'], tmp_path/'image.npy') < 60
    with pytest.raises(RuntimeError, match='config.json'): first_prediction(tmp_path, tmp_path/'image.npy')
    seconds = node_seconds(d['files']['4'], d['images'][:1], runs=4)
    assert 0 < products_only(seconds) < sum(seconds.values()) and {'QLinearConv', 'QLinearConv 2', 'QGemm'} <= set(seconds)
    with pytest.raises(BadInput, match='is not a file'): node_seconds(tmp_path/'none.onnx', d['images'][:1])
    with pytest.raises(BadInput, match='runs is 0'): node_seconds(d['files']['4'], d['images'][:1], runs=0)
    assert products_only({'QLinearConv': 1., 'QLinearConv 2': 2., 'QGemm': 4., 'MatMulInteger': 8., 'Clip': 16., 'Conv': 32.}) == 15


def test_floors_pauses_and_words():
    assert {k: byte_floor(k) for k in PER_CYCLE} == dict(avx512_vnni=.25, avx512bw=.75, avx_vnni=.25, avx2=.5) and byte_floor(None) is None
    called = []
    steps = rested(dict(a=lambda: called.append('a'), b=lambda: called.append('b')), 0)
    for f in steps.values(): f()
    assert called == ['a', 'b'] and list(steps) == ['pause 0', 'a', 'pause 1', 'b']
    assert [in_words(1/8, '1/x'), in_words(None), in_words(.5)] == ['1/8.00', '–', '0.50']
    m = dict(low=.3, high=.3, seconds=.0001, n=3, floor=.25)
    df = results_frame(dict(onnx4_1_1=dict(m, value=.3), onnx4_bytes=dict(m, value=1/7.5, seconds=None)))
    assert df.floor.tolist() == ['0.25', '1/4.00'] and df.held.tolist() == ['yes', 'no'] and df['median time'].tolist() == ['0.100 ms', '–']


@pytest.mark.parametrize('text,want', [('flags\t\t: fpu avx2 fma', 'avx2'), ('flags : avx2 avx_vnni avx512bw avx512_vnni', 'avx512_vnni'), ('flags : avx2 avx_vnni', 'avx_vnni'), ('flags : avx2 avx512bw', 'avx512bw'),
    ('flags : sse4_2', None), ('Features : asimd', None), (None, None)], ids=str)
def test_instruction_set(monkeypatch, text, want):
    def read(self, *a, **kw):
        if text is None: raise FileNotFoundError
        return f'processor : 0\n{text}\nbugs :'
    monkeypatch.setattr(Path, 'read_text', read)
    assert instruction_set() == want


def test_a_figure_that_fails_costs_no_numbers(tmp_path, monkeypatch):
    import qisal.bench as module
    cell = nbformat.v4.new_code_cell("rows = ''; batch = 1; repeats = 1; n_threads = 1; out = ''", metadata=dict(tags=['parameters']))
    cells = [cell, nbformat.v4.new_code_cell("from pathlib import Path\nPath(out, 'bench.json').write_text('{\"für\": 1}', encoding='utf-8')"), nbformat.v4.new_code_cell("raise RuntimeError('no ink')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'broken.ipynb')
    monkeypatch.setattr(module, 'asset', lambda *a: tmp_path/'broken.ipynb')
    with pytest.raises(papermill.PapermillExecutionError, match='no ink'): run_benchmark(tmp_path/'out', rows='memory')
    assert json.loads((tmp_path/'out'/'bench.json').read_text(encoding='utf-8')) == {'für': 1}


def test_the_notebook_writes_its_numbers_before_it_draws_them():
    "... and makes the folder."
    nb = nbformat.read(Path(__file__).parents[1]/'nbs'/'80_benchmark.ipynb', 4)
    at = lambda text: next(i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and text in c.source and '#| export' not in c.source)
    assert at("write_json(folder/'bench.json'") < at('bars = plot_rows') < at("('bench.png', bars)") and 'folder.mkdir(parents=True, exist_ok=True)' in nb.cells[at("write_json(folder/'bench.json'")].source
