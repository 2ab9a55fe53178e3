"""The wheel as a user gets it: built, looked into, installed beside the newest fastai and without nbdev, used from another folder.

Needs the package registry. The second environment, `.venv-wheel`, borrows only torch and what torch brings (6 GB) from the first one,
by links in a folder of its own, so that nothing else of the first can be seen. KEEP=1 keeps it.
"""
import email, json, os, re, shutil, subprocess, sys, tarfile, zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from checkout import ROOT, copy_to
from lock import settings

ENV = ROOT/'.venv-wheel'
PY = ENV/'bin'/'python'

def run(*cmd, **kw):
    "Run a command to its end; a failure shows what it said."
    r = subprocess.run([str(o) for o in cmd], capture_output=True, text=True, **kw)
    assert r.returncode == 0, f"{' '.join(str(o) for o in cmd)}\n{r.stdout[-6000:]}\n{r.stderr[-6000:]}"
    return r.stdout

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(source archive, wheel made from that archive), built from a copy whose path has a blank."
    src, dst = copy_to(tmp_path_factory.mktemp('a source')), tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--outdir', dst, src)
    return next(dst.glob('*.tar.gz')), next(dst.glob('*.whl'))

@pytest.fixture(scope='module')
def names(built): return set(zipfile.ZipFile(built[1]).namelist())

@pytest.fixture(scope='module')
def meta(built):
    z = zipfile.ZipFile(built[1])
    return email.message_from_bytes(z.read(next(o for o in z.namelist() if o.endswith('.dist-info/METADATA'))))

def test_wheel_holds_the_library_and_its_assets(names):
    want = {o.relative_to(ROOT).as_posix() for o in (ROOT/'qisal').rglob('*.py')}
    want |= {f'qisal/assets/templates/{o}' for o in ('80_benchmark.ipynb', '90_experiment.ipynb', '91_study.ipynb')}
    samples = [o for o in (ROOT/'data'/'samples').rglob('*') if o.is_file()]
    assert samples
    want |= {f"qisal/assets/samples/{o.relative_to(ROOT/'data'/'samples').as_posix()}" for o in samples}
    assert want <= names, sorted(want - names)

def test_wheel_holds_nothing_else(names):
    for o in names:
        assert o.startswith(('qisal/', 'qisal-')), o
        assert not re.search(r'(^|/)(tests|reports|cache|__pycache__|runs|models)/|\.(pkl|pth|pt|safetensors|pyc)$', o), o
        assert 'cifar' not in o.lower(), f'{o}: CIFAR-10 has no licence and never travels'

def test_wheel_is_small(built): assert built[1].stat().st_size < 6 * 2**20

def test_assets_are_the_files_of_the_checkout(built):
    z = zipfile.ZipFile(built[1])
    for o in ('80_benchmark.ipynb', '90_experiment.ipynb', '91_study.ipynb'): assert z.read(f'qisal/assets/templates/{o}') == (ROOT/'nbs'/o).read_bytes()

def test_metadata(meta, built):
    s = settings()
    assert (meta['Name'], meta['Version'], meta['Summary']) == ('qisal', s['version'], s['description'])
    assert meta['License-Expression'] == 'Apache-2.0' and meta['Requires-Python'] == f">={s['min_python']}"
    assert meta['Description-Content-Type'] == 'text/markdown'
    if (ROOT/'README.md').exists(): assert meta.get_payload().strip().startswith((ROOT/'README.md').read_text(encoding='utf-8').strip()[:60])
    reqs = [Requirement(o) for o in meta.get_all('Requires-Dist')]
    runtime = {canonicalize_name(r.name) for r in reqs if r.marker is None}
    assert runtime == {canonicalize_name(Requirement(o).name) for o in s['requirements'].split()}
    assert 'nbdev' not in runtime and all(op.operator == '>=' for r in reqs if r.marker is None for op in r.specifier)
    z = zipfile.ZipFile(built[1])
    assert 'qisal = qisal.cli:main' in z.read(next(o for o in z.namelist() if o.endswith('entry_points.txt'))).decode()
    assert any(o.endswith('/LICENSE') for o in z.namelist())

def test_source_archive_is_enough(built):
    "The wheel was made from it; it holds what a build needs and no results."
    with tarfile.open(built[0]) as t: inside = {o.split('/', 1)[-1] for o in t.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'nbs/80_benchmark.ipynb', 'nbs/90_experiment.ipynb', 'nbs/91_study.ipynb'} <= inside
    assert not [o for o in inside if o.startswith(('reports', 'tests', '.venv', 'data/cache'))]

def test_wheel_straight_from_the_checkout_is_the_same(names, tmp_path):
    "`pip install .` ships what the source archive's wheel ships, and a stale build folder doesn't get in."
    src = copy_to(tmp_path/'src')
    (src/'build'/'lib'/'qisal').mkdir(parents=True)
    (src/'build'/'lib'/'qisal'/'gone.py').write_text('stale = True\n', encoding='utf-8')
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path/'out', src)
    assert set(zipfile.ZipFile(next((tmp_path/'out').glob('*.whl'))).namelist()) == names

def borrowed():
    "torch, torchvision and the GPU libraries they bring: the distributions that are too big to fetch twice."
    have, todo = {}, ['torch', 'torchvision']
    while todo:
        name = canonicalize_name(todo.pop())
        if name in have: continue
        have[name] = distribution(name)
        for o in have[name].requires or []:
            r = Requirement(o)
            if re.match(r'nvidia-|cuda-|triton', r.name) and canonicalize_name(r.name) in installed(): todo.append(r.name)
    return have

def installed(): return {canonicalize_name(o.metadata['Name']) for o in distributions()}

def link(dists, folder):
    "Link the top-level folders and files of `dists` into `folder`."
    folder.mkdir()
    for d in dists.values():
        for top in {f.parts[0] for f in d.files or [] if f.parts[0] not in ('..', '__pycache__')}:
            src = Path(d.locate_file(top)).resolve()
            if src.exists() and not (folder/top).exists(): (folder/top).symlink_to(src)

def lonely_env(home):
    "Environment variables of a user who has only the second environment, and an empty home."
    keep = {k: v for k, v in os.environ.items() if k in ('LANG', 'LC_ALL', 'TMPDIR')}
    return {**keep, 'PATH': f"{ENV/'bin'}:/usr/local/bin:/usr/bin:/bin", 'HOME': str(home), 'OMP_NUM_THREADS': '1'}

@pytest.fixture(scope='module')
def user(built, tmp_path_factory):
    "Installs the wheel; gives a function that runs a command as that user, in an empty folder."
    shutil.rmtree(ENV, ignore_errors=True)
    try:
        run(sys.executable, '-m', 'venv', ENV)
        dists = borrowed()
        link(dists, ENV/'borrowed')
        site = Path(run(PY, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
        (site/'_borrow.pth').write_text(f"{ENV/'borrowed'}\n", encoding='utf-8')
        pins = tmp_path_factory.mktemp('pins')/'borrowed.txt'  # a borrowed package is never replaced
        pins.write_text(''.join(f'{n}=={d.version}\n' for n, d in sorted(dists.items())), encoding='utf-8')
        run(PY, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '-c', pins, built[1], 'fastai>=2.8.12', 'fastcore>=2')
        home, work = tmp_path_factory.mktemp('empty home'), tmp_path_factory.mktemp('another folder')
        def go(*cmd): return subprocess.run([str(o) for o in cmd], cwd=work, env=lonely_env(home), capture_output=True, text=True, encoding='utf-8')
        go.work, go.home = work, home
        yield go
    finally:
        if not os.environ.get('KEEP'): shutil.rmtree(ENV, ignore_errors=True)

LOOK = '''
import importlib.metadata as m, importlib.util as u, json, sys
import qisal
heavy = [o for o in ('torch', 'fastai', 'matplotlib', 'pandas') if o in sys.modules]
import fastai, fastcore, torch, torchvision, numpy
print(json.dumps(dict(heavy=heavy, files={o.__name__: o.__file__ for o in (qisal, fastai, fastcore, torch, numpy)}, path=sys.path,
    versions={o: m.version(o) for o in ('qisal', 'fastai', 'fastcore', 'torch', 'torchvision')}, nbdev=u.find_spec('nbdev') is not None)))
'''

def test_second_environment_is_what_it_claims(user):
    "The newest fastai, fastcore 2, no nbdev, the wheel's own qisal, and nothing of the first environment but what was borrowed."
    r = user(PY, '-c', LOOK)
    assert r.returncode == 0, r.stderr
    got = json.loads(r.stdout.splitlines()[-1])
    number = lambda o: tuple(int(x) for x in got['versions'][o].split('.')[:3] if x.isdigit())
    assert number('fastai') >= (2, 8, 12) and number('fastcore') >= (2,), got['versions']
    assert got['nbdev'] is False and got['heavy'] == []
    for o in ('qisal', 'fastai', 'fastcore', 'numpy'): assert got['files'][o].startswith(str(ENV/'lib')), got['files'][o]
    assert got['files']['torch'].startswith(str(ENV/'borrowed'))
    assert not [o for o in got['path'] if o.startswith(str(ROOT/'.venv') + os.sep) or o == str(ROOT)]

def test_every_module_imports(user):
    code = "import pkgutil, importlib, qisal\nfor o in pkgutil.walk_packages(qisal.__path__, 'qisal.'):\n    if not o.name.endswith('_modidx'): importlib.import_module(o.name)\nprint('fine')"
    r = user(PY, '-c', code)
    assert r.returncode == 0 and r.stdout.endswith('fine\n'), r.stderr

def test_help(user):
    r = user('qisal', '--help')
    assert r.returncode == 0 and 'study' in r.stdout and 'report' in r.stdout, r.stderr

def test_bad_input_is_refused(user):
    r = user('qisal', 'study', '--profile', 'smoke', '--bits', '5', '--out', 'bad')
    assert r.returncode == 2 and '5' in r.stderr + r.stdout and not (user.work/'bad').exists(), r.stdout + r.stderr

def test_study_runs_from_another_folder(user):
    "Templates and samples travel in the wheel: the smoke study at 4 bits trains, and its report is written where the user said."
    r = user('qisal', 'study', '--profile', 'smoke', '--bits', '4', '--jobs', '2', '--out', 'my study')
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-4000:]
    out = user.work/'my study'
    assert (out/'report.html').stat().st_size > 10_000
    metrics = [json.loads(o.read_text(encoding='utf-8')) for o in sorted(out.glob('runs/*/metrics.json'))]
    assert {o['spec']['guided'] for o in metrics} == {False, True} and all(o['spec']['bits'] == '4' for o in metrics)
    assert all(o['accuracy'] > .8 for o in metrics), [o['accuracy'] for o in metrics]
    assert sorted(o.name for o in user.work.iterdir()) == ['my study'], 'files outside of the output folder'

README_CODE = '''
from fastai.vision.all import *
from qisal.all import *
dls = get_dls('mnist', sample=True, n_train=256)
learn = Learner(dls, small_cnn(), metrics=accuracy, cbs=[PACTCallback(w_bits=4, a_bits=4), SaliencyMaskingCallback(frac=.5)])
learn.fit_one_cycle(1)
assert len(learn.pact.alphas()), 'no alpha'
print('trained')
'''

def test_two_callbacks_on_a_learner(user):
    "What a practitioner types, with the newest fastai."
    r = user(PY, '-c', README_CODE)
    assert r.returncode == 0 and 'trained' in r.stdout, r.stderr[-4000:]
