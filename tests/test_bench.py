"""The benchmark runs every row and reports what it found; it judges nothing, and no test here looks at a time."""
import json, re
from pathlib import Path

import nbformat, papermill, pytest
from PIL import Image
from test_cli import qisal, refused

from qisal.bench import GROUPS, PEERS, ROWS, results_frame, run_benchmark
from qisal.core import BadInput


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Every group but `study`, at a small size, with one peer that is there and broken."
    out, fake = tmp_path_factory.mktemp('bench'), tmp_path_factory.mktemp('peers')/'brevitas'
    fake.mkdir()
    (fake/'__init__.py').write_text("")
    (fake/'nn.py').write_text("raise ImportError('this torch is too new for me')")
    groups = ','.join(o for o in GROUPS if o != 'study')
    r = qisal('bench', '--rows', groups, '--batch', 8, '--repeats', 1, '--out', out/'results', PYTHONPATH=f'{fake.parent}:{Path(__file__).parents[1]}')
    assert r.returncode == 0, r.stderr
    return out/'results', r


def test_every_row_is_measured_once(small):
    out, r = small
    result = json.loads((out/'bench.json').read_text())
    assert set(result['rows']) == {k for k, v in ROWS.items() if v.group != 'study'}
    for name, row in result['rows'].items():
        assert row['title'] in r.stdout
        if name in PEERS: continue
        if name == 'pact' and row['value'] is None: assert row['why'] == 'no C++ compiler'
        else: assert row['low'] <= row['value'] <= row['high'] and row['value'] > 0 and row['n'] >= 1
    assert result['rows']['fp32']['value'] == 1 and result['parameters'] == dict(rows=[o for o in GROUPS if o != 'study'], batch=8, repeats=1, n_threads=2)
    assert len(result['ways']) >= 6 and len(result['scaling']) == 5 and result['provenance']['versions']['torch']


def test_a_peer_that_is_missing_is_a_row_and_no_error(small):
    rows = json.loads((small[0]/'bench.json').read_text())['rows']
    assert rows['brevitas']['value'] is None and 'fails: ImportError: this torch is too new for me' in rows['brevitas']['why']
    for o in ('fms', 'fasterai'): assert rows[o]['why'] == 'not installed' or rows[o]['value'] > 0
    assert 'too new for me' in small[1].stdout


def test_memory_of_a_masking_curve_is_flat_in_the_number_of_images(small):
    flat = json.loads((small[0]/'bench.json').read_text())['scaling']['Memory of a masking curve']
    assert max(flat['series']['10 levels']) < 1.05*min(flat['series']['10 levels'])


def test_the_notebook_and_the_figures_are_kept(small):
    out, _ = small
    assert {o.name for o in out.iterdir()} == {'bench.json', 'bench.png', 'scaling.png', 'benchmark.ipynb'}
    for o in ('bench.png', 'scaling.png'): assert Image.open(out/o).size[0] >= 900
    text = (out/'benchmark.ipynb').read_text()
    nbformat.validate(nbformat.reads(text, 4))
    plain = re.sub(r'"image/png": "[^"]*"', '', text)
    assert str(out) not in plain and '/tmp' not in plain and str(Path(__file__).parents[1]) not in plain


@pytest.mark.parametrize('args,words', [(['--rows', 'stepz'], ["rows 'stepz'", "Did you mean 'steps'"]), (['--rows', 'steps,,memory'], ["rows ''"]), (['--batch', '1'], ['batch is 1']),
    (['--batch', '5000'], ['batch is 5000']), (['--repeats', '0'], ['repeats is 0']), (['--repeats', 'x'], ['--repeats']), (['--threads', '0'], ['threads is 0'])], ids=str)
def test_bad_wishes_are_refused_before_anything(tmp_path, args, words):
    refused(qisal('bench', '--out', tmp_path/'out', *args), *words)
    assert not (tmp_path/'out').exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path/'file').write_text('x')
    for o in ('file', 'file/below'):
        with pytest.raises(BadInput, match='out is .*name another folder'): run_benchmark(tmp_path/o, rows='memory')
    assert (tmp_path/'file').read_text() == 'x'


def test_a_measurement_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    import qisal.bench as module
    cell = nbformat.v4.new_code_cell("rows = ''; batch = 1; repeats = 1; n_threads = 1; out = ''", metadata=dict(tags=['parameters']))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("raise MemoryError('too large')")]), tmp_path/'broken.ipynb')
    monkeypatch.setattr(module, 'asset', lambda *a: tmp_path/'broken.ipynb')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'bench.json').write_text('{"old": 1}')
    with pytest.raises(papermill.PapermillExecutionError, match='too large'): run_benchmark(tmp_path/'out', progress=False)
    assert {o.name: o.read_text() for o in (tmp_path/'out').iterdir()} == {'bench.json': '{"old": 1}'}


def test_the_table_says_what_held():
    m = dict(low=1., high=1.2, seconds=.1, n=3)
    df = results_frame(dict(fp32=dict(m, value=1.), pact=dict(m, value=1.05), guided=dict(m, value=2.6), brevitas=dict(value=None, low=None, high=None, seconds=None, n=0, why='not installed')))
    assert df.held.tolist() == ['', 'yes', 'no', ''] and df.quartiles.tolist()[-1] == 'not installed' and df.measured.tolist() == ['1.00', '1.05', '2.60', '–']
