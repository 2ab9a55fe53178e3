"Other locales, no home folder, a user without a name: what is read and written stays the same, and what can't be had is asked for in one sentence."
import ast, json, os, re, subprocess, sys
from pathlib import Path

import pytest
from PIL import Image

from checkout import ROOT
from test_run import SPEC, data, spec_file, template  # noqa: F401 (fixtures)
from qisal.core import BadInput, check_text, home_folder, home_variables, read_json
from qisal.data import data_root, get_arrays

ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

def python(*args, keep=('PATH', 'PYTHONPATH', 'LD_LIBRARY_PATH', 'OMP_NUM_THREADS'), cwd=None, **env):
    "A Python process in bare surroundings."
    env = {**{k: os.environ[k] for k in keep if k in os.environ}, 'PYTHONPATH': str(ROOT), **env}
    return subprocess.run([sys.executable, *map(str, args)], env=env, cwd=cwd, capture_output=True, encoding='utf-8', timeout=600)

def one_sentence(r, *words):
    assert r.returncode == 2 and r.stdout == '' and r.stderr.startswith('qisal: error: ') and r.stderr.count('\n') == 1, r.stdout + r.stderr
    for o in words: assert o in r.stderr, r.stderr

# ---------------------------------------------------------------- locales
READS = {'read_text': 0, 'write_text': 1}  # method -> number of its arguments besides encoding

def without_encoding(tree):
    "Calls that read or write text in the locale's encoding."
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call) or any(k.arg in ('encoding', None) for k in n.keywords): continue
        name, given = getattr(n.func, 'attr', getattr(n.func, 'id', '')), {k.arg: k.value for k in n.keywords}
        if READS.get(name) == len(n.args): yield n
        elif name in ('run', 'Popen', 'check_output') and {'text', 'universal_newlines'} & set(given): yield n
        elif isinstance(n.func, ast.Name) and name == 'open' and 'b' not in str(getattr(given.get('mode', n.args[1] if n.args[1:] else None), 'value', '')): yield n

def test_the_search_for_encodings_can_find():
    for bad in ('p.read_text()', 'p.write_text(x)', "open(p)", "open(p, 'w')", 'subprocess.run(c, text=True)'): assert list(without_encoding(ast.parse(bad))), bad
    for good in ("p.read_text(encoding='utf-8')", "open(p, 'rb')", "open(p, mode='wb')", 'os.open(p, 1)', 'Image.open(p)', 'subprocess.run(c, capture_output=True)'):
        assert not list(without_encoding(ast.parse(good))), good

@pytest.mark.parametrize('path', sorted((ROOT/'qisal').rglob('*.py')), ids=lambda o: o.relative_to(ROOT/'qisal').as_posix())
def test_every_text_file_is_utf8(path):
    found = [f'line {n.lineno}: {ast.unparse(n)}' for n in without_encoding(ast.parse(path.read_text(encoding='utf-8')))]
    assert not found, found

def test_json_that_is_no_utf8_or_too_deep(tmp_path):
    for raw in (b'{"a": "\xfc"}', b'['*100_000):
        (tmp_path/'a.json').write_bytes(raw)
        with pytest.raises(BadInput, match=f'{re.escape(str(tmp_path))}.a.json is no valid JSON'): read_json(tmp_path/'a.json')

def test_text_that_the_terminal_cannot_show_is_spelled_out():
    code = "import sys\nfrom qisal import cli\n@cli.app.command()\ndef hello(): print('f\\xfcr')\nsys.argv = ['qisal', 'hello']\ncli.main()"
    assert (r := python('-c', code, **ASCII)).returncode == 0 and r.stdout == 'f\\xfcr\n', r.stderr
    assert python('-c', code, LC_ALL='C.UTF-8').stdout == 'für\n'

def test_folders_with_umlauts_in_any_locale(tmp_path):
    for c in ('größer', 'kleiner'):
        (tmp_path/c).mkdir()
        for i in range(3): Image.new('L', (30, 30), 50*i).save(tmp_path/c/f'{i}.png')
    said = [python('-m', 'qisal.cli', 'data', f'folder:{tmp_path}', **o) for o in (dict(LC_ALL='C.UTF-8'), dict(LC_ALL='C'))]
    assert [o.returncode for o in said] == [0, 0] and said[0].stdout == said[1].stdout and 'classes: größer, kleiner' in said[0].stdout
    one_sentence(python('-m', 'qisal.cli', 'data', f'folder:{tmp_path}', **ASCII), 'reads names as ascii', 'PYTHONUTF8=1')

def test_a_name_that_is_no_utf8_says_which_it_is():
    with pytest.raises(BadInput, match=r"the folder 'f\\udcfcr' is not UTF-8 text .*; rename it") as e: check_text('the folder', os.fsdecode(b'f\xfcr'))
    str(e.value).encode()

# ---------------------------------------------------------------- no home
@pytest.fixture
def homeless(monkeypatch):
    "A user whom the system doesn't know, and no HOME."
    def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')
    monkeypatch.setattr('pwd.getpwuid', unknown)
    monkeypatch.delenv('HOME', raising=False)
    for o in ('QISAL_DATA', 'JUPYTER_DATA_DIR', 'JUPYTER_CONFIG_DIR', 'IPYTHONDIR', 'MPLCONFIGDIR'): monkeypatch.delenv(o, raising=False)

def test_full_data_ask_for_a_folder(homeless, monkeypatch, tmp_path):
    for f in (data_root, lambda: get_arrays('mnist')):
        with pytest.raises(BadInput, match='needs a home folder, and this user has none; set QISAL_DATA to a folder you may write') as e: f()
        assert '\n' not in str(e.value)
    monkeypatch.setenv('QISAL_DATA', str(tmp_path))
    assert data_root() == tmp_path

def test_jupyters_files_go_elsewhere_only_without_a_home(homeless, monkeypatch, tmp_path):
    assert home_folder() is None and home_variables('x') == dict.fromkeys(('JUPYTER_DATA_DIR', 'JUPYTER_CONFIG_DIR', 'IPYTHONDIR', 'MPLCONFIGDIR'), 'x')
    monkeypatch.setenv('MPLCONFIGDIR', 'mine')
    assert 'MPLCONFIGDIR' not in home_variables('x')
    for home in ('/no/such/place', ''):
        monkeypatch.setenv('HOME', home)
        assert home_folder() is None, home
    monkeypatch.setenv('HOME', str(tmp_path))
    with monkeypatch.context() as m:
        m.setattr('os.access', lambda path, mode: Path(path) != tmp_path)  # to root nothing seems closed
        assert home_folder() is None
    assert home_folder() == tmp_path and home_variables('x') == {}

def test_a_cache_that_may_not_be_read_is_passed_over(monkeypatch, tmp_path):
    "HOME=/root for another user: every look raises PermissionError."
    def locked(self, **kw): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'stat', locked)
    with pytest.raises(BadInput, match='Permission denied'): get_arrays('mnist', tmp_path, sources=('cache',))

BARE = '''import os, pwd, sys
def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')
pwd.getpwuid = unknown
'''

def test_a_run_needs_no_home(tmp_path, template):  # noqa: F811
    "No HOME and an unknown user in this process and, through `sitecustomize`, in the run's own; nothing is left beside the results."
    for o in ('site', 'work'): (tmp_path/o).mkdir()
    (tmp_path/'site'/'sitecustomize.py').write_text(BARE, encoding='utf-8')
    env = dict(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path/'site'}", OMP_NUM_THREADS='1')
    assert 'uid not found' in python('-c', 'import os, pwd; pwd.getpwuid(os.getuid())', **env).stderr
    cmd = ['-m', 'qisal.cli', 'run', '--spec', spec_file(tmp_path), '--out', 's', '--template', template]
    r = python(*cmd, cwd=tmp_path/'work', **env)
    assert r.returncode == 0 and r.stdout == f'{SPEC.run_id}: accuracy 50.00%\n' and r.stderr == '', r.stdout + r.stderr
    assert [o.name for o in (tmp_path/'work').iterdir()] == ['s']
    one_sentence(python('-m', 'qisal.cli', 'data', 'mnist', cwd=tmp_path/'work', **env), 'set QISAL_DATA')
