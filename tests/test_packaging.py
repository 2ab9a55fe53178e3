"settings.ini, the lock, the Makefile and the continuous-integration files say the same thing, and the Makefile keeps its promises."
import os, re, shutil, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from checkout import ROOT, tracked
from lock import settings

def reqs(key): return [Requirement(o) for o in settings()[key].split()]

def pins():
    "The lock's lines as requirements."
    return [Requirement(o) for o in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if o.strip() and not o.startswith('#')]

@pytest.fixture
def box(tmp_path):
    "The files that `make setup` reads, in a folder whose name has a blank, and a stand-in for python3 that only records what it is asked."
    home = tmp_path/'a checkout'
    home.mkdir()
    for o in ('Makefile', 'settings.ini', 'constraints.txt', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/o, home/o)
    return home

def stand_in(folder, version_ok=True, pip_ok=True):
    "A script that plays python3: it answers the version check, makes an environment of itself and logs every pip call."
    path = folder/'python3'
    path.write_text(f'''#!/bin/bash
case "$1 $2" in
  -c*) exit {0 if version_ok else 1};;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0;;
  "-m pip") [ "$3" = --version ] || {{ echo "$@" >> pip.log; exit {0 if pip_ok else 1}; }};;
esac
''', encoding='utf-8')
    path.chmod(0o755)
    return path

def make(box, *args, path=None):
    env = {'PATH': f"{path or box}:/usr/bin:/bin", 'HOME': str(box)}
    return subprocess.run(['make', *args], cwd=box, env=env, capture_output=True, text=True, encoding='utf-8')

def test_version_is_one():
    import qisal
    assert qisal.__version__ == settings()['version']

def test_runtime_requirements_are_open():
    "Users get the newest of everything: no pin and no upper bound outside of the extras."
    for r in reqs('requirements'):
        assert all(s.operator == '>=' for s in r.specifier), f'{r} is not open'
        assert canonicalize_name(r.name) not in {'nbdev', 'execnb', 'ghapi'}, f'{r} is a development tool'

def test_lock_covers_the_requirements():
    locked = {canonicalize_name(r.name) for r in pins() if r.marker is None or r.marker.evaluate()}
    for r in reqs('requirements') + reqs('dev_requirements'): assert canonicalize_name(r.name) in locked, f'{r.name}: run `make lock`'

def test_lock_keeps_the_requirements():
    "A locked version lies in the range that settings.ini asks for, on this Python and on every other."
    for r in reqs('requirements') + reqs('dev_requirements'):
        found = [p for p in pins() if canonicalize_name(p.name) == canonicalize_name(r.name)]
        for p in found: assert r.specifier.contains(next(iter(p.specifier)).version), f'{p} is not {r}: run `make lock`'

@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12', '3.13'])
def test_lock_has_one_pin_a_python(python):
    env = {'python_version': python, 'python_full_version': f'{python}.9', 'sys_platform': 'linux', 'platform_machine': 'x86_64'}
    names = [canonicalize_name(r.name) for r in pins() if r.marker is None or r.marker.evaluate(env)]
    assert len(set(names)) == len(names)
    assert {'torch', 'torchvision', 'fastai', 'numpy', 'nbdev'} <= set(names)

def test_lock_names_only_packages():
    for r in pins():
        assert r.url is None and [s.operator for s in r.specifier] == ['=='], r
    assert '://' not in (ROOT/'constraints.txt').read_text(encoding='utf-8')

def test_environment_is_the_locked_one():
    "What is installed here is what is locked."
    if not (ROOT/'.venv'/'.ready').exists() or Path(sys.prefix).resolve() != (ROOT/'.venv').resolve(): pytest.skip('not run by make')
    wrong = []
    for r in pins():
        if r.marker is not None and not r.marker.evaluate(): continue
        try: have = version(r.name)
        except PackageNotFoundError: continue
        if not r.specifier.contains(have): wrong.append(f'{r.name} {have}, locked {r.specifier}')
    assert not wrong

def test_ci_calls_make_test():
    lines = [o for o in (ROOT/'.ci'/'run').read_text(encoding='utf-8').splitlines() if o and not o.startswith('#')]
    assert [o.removeprefix('exec ') for o in lines if 'make' in o] == ['make test']
    assert 'set -euo pipefail' in lines and os.access(ROOT/'.ci'/'run', os.X_OK)
    assert re.search(r'run: make test$', (ROOT/'.github'/'workflows'/'test.yaml').read_text(encoding='utf-8'), re.M)

def test_stamp_makes_the_second_setup_free():
    if not (ROOT/'.venv'/'.ready').exists(): pytest.skip('not run by make')
    r = subprocess.run(['make', '-q', '.venv/.ready'], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert r.returncode == 0, 'settings.ini, the lock or the packaging changed: run `make setup`'

def test_setup_installs_once(box):
    "One pip call with the lock, torch together with torchvision; the second `make` makes none; a changed lock makes one."
    stand_in(box)
    r = make(box, 'setup')
    assert r.returncode == 0, r.stderr
    calls = (box/'pip.log').read_text(encoding='utf-8').splitlines()
    assert len(calls) == 1 and '-c constraints.txt torch torchvision -e .[dev]' in calls[0]
    assert (box/'.venv'/'.ready').read_text(encoding='utf-8').splitlines()[0] == str(box) and not (box/'.venv'/'.installing').exists()
    assert make(box, 'setup').returncode == 0 and len((box/'pip.log').read_text(encoding='utf-8').splitlines()) == 1
    os.utime(box/'pyproject.toml')  # nbdev_export does that
    assert make(box, 'setup').returncode == 0 and len((box/'pip.log').read_text(encoding='utf-8').splitlines()) == 1
    (box/'constraints.txt').write_text((box/'constraints.txt').read_text(encoding='utf-8') + 'another==1\n', encoding='utf-8')
    assert make(box, 'setup').returncode == 0 and len((box/'pip.log').read_text(encoding='utf-8').splitlines()) == 2

@pytest.mark.skipif(not shutil.which('flock'), reason='no flock here')
def test_two_makes_at_once_install_once(box):
    "The second waits for the first and finds everything done."
    script = stand_in(box)
    script.write_text(script.read_text(encoding='utf-8').replace('"-m pip") ', '"-m pip") sleep .3; '), encoding='utf-8')
    env = {'PATH': f'{box}:/usr/bin:/bin', 'HOME': str(box)}
    both = [subprocess.Popen(['make', 'setup'], cwd=box, env=env, stdout=subprocess.PIPE, text=True, encoding='utf-8') for _ in range(2)]
    said = [o.communicate(timeout=60)[0] for o in both]
    assert [o.returncode for o in both] == [0, 0] and 'waiting' in ''.join(said)
    assert len((box/'pip.log').read_text(encoding='utf-8').splitlines()) == 1

def test_failed_installation_leaves_no_stamp(box):
    "... and the next `make` starts over instead of believing what lies there."
    stand_in(box, pip_ok=False)
    r = make(box, 'setup')
    assert r.returncode != 0 and 'starts it over' in r.stderr
    assert not (box/'.venv'/'.ready').exists() and (box/'.venv'/'.installing').exists()
    (box/'.venv'/'half a package').touch()
    stand_in(box)
    assert make(box, 'setup').returncode == 0
    assert (box/'.venv'/'.ready').exists() and not (box/'.venv'/'half a package').exists()

def test_moved_checkout_gets_a_new_environment(box):
    stand_in(box)
    assert make(box, 'setup').returncode == 0
    moved = box.with_name('moved here')
    box.rename(moved)
    (moved/'.venv'/'old').touch()
    assert make(moved, 'setup').returncode == 0
    assert not (moved/'.venv'/'old').exists() and (moved/'.venv'/'.ready').read_text(encoding='utf-8').splitlines()[0] == str(moved)

def test_old_python_is_refused(box):
    "Named or found, a Python below 3.10 gets one sentence and no environment."
    old = stand_in(box, version_ok=False)
    r = make(box, 'setup', f'PYTHON={old}')
    assert r.returncode != 0 and 'Python 3.10 or newer' in r.stderr and str(old) in r.stderr
    assert not (box/'.venv').exists()

def test_no_browser_is_said(box):
    "Without a browser and without apt-get there is a message that names what to install."
    tools = box/'tools'
    tools.mkdir()
    for o in ('bash', 'id', 'make', 'cat', 'pwd'):
        if shutil.which(o): (tools/o).symlink_to(shutil.which(o))
    r = subprocess.run([shutil.which('make'), 'browser'], cwd=box, env={'PATH': str(tools)}, capture_output=True, text=True, encoding='utf-8')
    assert r.returncode != 0 and 'install chromedriver and chromium' in r.stderr

def test_committed_files():
    "No pickles, nothing above 4 MB, no environment, no cache."
    files = tracked()
    if files is None: pytest.skip('no git here')
    bad = [o for o in files if o.suffix in {'.pkl', '.pickle', '.pth', '.pt', '.joblib', '.pyc'} or o.stat().st_size > 4 * 2**20]
    assert not bad
    assert not [o for o in files if o.relative_to(ROOT).parts[0].startswith('.venv')]
    assert not [o for o in files if o.read_bytes()[:2] in (b'\x80\x03', b'\x80\x04', b'\x80\x05')], 'a pickle by its content'

def test_top_level():
    "The layout is fixed: what the study is made of, and what packaging needs."
    files = tracked()
    if files is None: pytest.skip('no git here')
    allowed = {'settings.ini', 'README.md', 'nbs', 'qisal', 'data', 'reports', 'tests', '.ci', '.github', '.gitignore', '.gitattributes', 'Makefile',
        'setup.py', 'pyproject.toml', 'MANIFEST.in', 'constraints.txt', 'LICENSE', 'CITATION.cff', 'CONTRIBUTING.md', 'CHANGELOG.md'}
    assert {o.relative_to(ROOT).parts[0] for o in files} <= allowed
