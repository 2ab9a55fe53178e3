"Predicting from a model folder: what goes in, what comes out in both runtimes, what is refused, and explanations by occlusion."
import itertools, json, os, pickle, shutil, subprocess, sys
import numpy as np
import onnx, onnxruntime
import pytest, torch
from PIL import Image
from torch import nn
import qisal.deploy as deploy
from qisal.core import BadInput
from qisal.data import ResidentDataset, folder_arrays, get_dls, sample_arrays
from qisal.deploy import export_model, integer_network, load_model, save_model
from qisal.models import get_model
from qisal.quant import bake, bit_policy, convert
from qisal.serve import Prediction, Predictor, explain, normalize_pixels, occlusion, predict, read_image, to_pixels
from test_deploy import Own
from test_export import FACTS, network, pytestmark  # noqa: F401 (a mark)

RGB = dict(classes=['cat', 'dog', 'owl'], n_in=3, size=32, stats=([.4914, .4822, .4465], [.2470, .2435, .2616]))
DIGITS = sample_arrays('mnist')
X = DIGITS.x_test[:40]

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A 4-bit LeNet-5 that knows its digits: (folder of export_model, folder of save_model)."
    import fastai.callback.schedule  # noqa: F401
    from fastai.learner import Learner
    from qisal.callback.pact import PACTCallback
    from qisal.core import set_seed
    set_seed(0)
    home, dls = tmp_path_factory.mktemp('models'), get_dls('mnist', sample=True, batch_size=64, device='cpu')
    learn = Learner(dls, get_model('lenet5'), cbs=PACTCallback(w_bits=4, a_bits=4))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 5e-3)
    save_model(learn, home/'saved')
    learn.model = learn.pact.bake()
    return export_model(learn, home/'shipped'), home/'saved'

@pytest.fixture(scope='module')
def colour(tmp_path_factory):
    "A network of colour images, untrained."
    torch.manual_seed(0)
    m = convert(get_model('lenet5', 3, 3, 32), bit_policy('4'), torch.randn(8, 3, 32, 32), input_range=(-2., 2.))
    return export_model(bake(m), tmp_path_factory.mktemp('colour')/'m', **RGB)

# --- pixels and their normalisation ---

@pytest.mark.parametrize('stats', [FACTS['stats'], RGB['stats'], ([0.], [1.]), ([.5], [1/255])], ids=['mnist', 'cifar', 'unit', 'steep'])
def test_every_byte_is_normalised_as_in_training(stats):
    c = len(stats[0])
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 7, 9, c).contiguous()
    want = ResidentDataset(x.permute(0, 3, 1, 2).contiguous(), torch.zeros(256), ['a'], stats).normalize(x.permute(0, 3, 1, 2))
    got = normalize_pixels(x.numpy(), stats)
    assert got.dtype == np.float32 and got.flags.c_contiguous and np.array_equal(got, want.numpy())

def test_pixels_are_those_of_the_test_loader(trained):
    dls = get_dls('mnist', sample=True, device='cpu')
    p = Predictor(trained[0])
    assert np.array_equal(normalize_pixels(p.pixels(DIGITS.x_test), p.stats), torch.cat([xb for xb, _ in dls.test]).numpy())

def test_a_file_is_read_as_a_folder_of_images_is(tmp_path):
    rng, x = np.random.default_rng(0), {}
    for mode, shape in (('L', (50, 37)), ('RGB', (20, 64, 3))):
        for c in 'ab':
            (tmp_path/mode/c).mkdir(parents=True)
            for i in range(3):
                img = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                exif = img.getexif(); exif[0x112] = 6  # to be turned by 90 degrees
                img.save(tmp_path/mode/c/f'{i}.png', exif=exif)
        a = folder_arrays(tmp_path/mode, size=32)
        want = {o.tobytes() for o in np.concatenate([a.x_train, a.x_test])}
        files = sorted((tmp_path/mode).rglob('*.png'))
        got = to_pixels(files, 32, len(mode), resize=True)
        assert len(want) == 6 and {o.tobytes() for o in got} == want
        assert np.array_equal(got, to_pixels([Image.open(o) for o in files], 32, len(mode), resize=True))

def test_every_way_to_give_an_image(tmp_path):
    Image.fromarray(X[0, ..., 0]).save(tmp_path/'0.png')
    odd = np.asfortranarray(X)[::2, ::-1]
    for o in (X[0], X[0, ..., 0], X[:1], X[:1, ..., 0], tmp_path/'0.png', str(tmp_path/'0.png'), Image.open(tmp_path/'0.png'), torch.from_numpy(X[0]), torch.from_numpy(X[:1]),
              [X[0]], (X[0, ..., 0],), [X[:1]], [tmp_path/'0.png'], [Image.open(tmp_path/'0.png')], [torch.from_numpy(X[0])]):
        assert np.array_equal(to_pixels(o, 28, 1), X[:1])
    assert np.array_equal(to_pixels(odd, 28, 1), odd) and np.array_equal(to_pixels(X[..., 0], 28, 1), X)
    assert np.array_equal(to_pixels(X[:28, ..., 0], 28, 1), X[:28])  # 28 images, not one with 28 channels
    c = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    assert np.array_equal(to_pixels(c, 32, 3), c) and np.array_equal(to_pixels(c[1], 32, 3), c[1:2]) and np.array_equal(to_pixels(Image.fromarray(c[2]), 32, 3), c[2:3])

def pil(mode, size=(28, 28)): return Image.new(mode, size)

REFUSED = {  # (images, words that the message must hold)
    'float': (X/255, ['float64', 'uint8 pixels']), 'float32 tensor': (torch.zeros(2, 28, 28, 1), ['float32', 'uint8 pixels']), 'bfloat16': (torch.zeros(2, 28, 28, 1, dtype=torch.bfloat16), ['uint8']),
    'NaN': (np.stack([X[0]/255, X[1]*np.nan]), ['NaN', 'index 1']), 'NaN tensor': (torch.full((28, 28), torch.nan), ['NaN']), '16 bits': (X.astype(np.uint16), ['uint16', 'more than 8 bits']), 'int64': (X.astype(int), ['int64', "astype('uint8')"]),
    'bool': (X > 9, ['bool']), 'text array': (np.array(['a']), ['<U1']), 'object': (np.array([None]), ['object']), 'scalar': (np.uint8(3), ['of type uint8']), '0-dimensional': (np.array(3, np.uint8), ['shape ()', '28 x 28']),
    'one axis': (X.reshape(-1), ['shape (31360,)']), 'five axes': (X[None], ['shape (1, 40, 28, 28, 1)']), 'height': (X[:, :27], ['(40, 27, 28, 1)', '28 x 28 pixels', 'resize=True']), 'width': (X[0, :, :27, 0], ['(28, 27)', '28 x 28']),
    'colour': (X.repeat(3, -1), ['(40, 28, 28, 3)', '1 channel', 'grey']), 'one in colour': (X[0].repeat(3, -1), ['(28, 28, 3)', '1 channel']), 'channels first': (X.transpose(0, 3, 1, 2), ['transpose(0, 2, 3, 1)']), 'one, channels first': (X[0].transpose(2, 0, 1), None),
    'no images': (X[:0], ['no images', '(0, 28, 28, 1)']), 'empty list': ([], ['no images', 'empty list']), 'None': (None, ['NoneType']), 'numbers': ([1, 2], ['image 0', 'int']), 'dict': ({}, ['dict']), 'iterator': (iter(X), ['iterator', 'a list']),
    'third of a list': ([X[0], X[1], X[2, :9]], ['image 2 of the list', '(9, 28, 1)']), 'batch in a list': ([X], ['image 0', 'holds 40 images']), 'float in a list': ([X[0], X[1]/255], ['image 1', 'float64']),
    'picture size': (pil('L', (28, 27)), ['28 x 27 pixels', '28 x 28', '--resize']), 'picture mode': (pil('RGB'), ['mode RGB', 'mode L', '--resize']), 'picture in a list': ([pil('L'), pil('LA')], ['image 1', 'mode LA']), 'one bit': (pil('1'), ['mode 1', 'mode L']),
    'palette': (pil('P'), ['mode P']), 'deep picture': (pil('I;16'), ['more than 8 bits', 'I;16']), 'float picture': (pil('F'), ['more than 8 bits', 'mode F']), 'CMYK': (pil('CMYK'), ['mode CMYK'])}

@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_image_for_the_model(trained, name):
    images, words = REFUSED[name]
    if words is None: return None if np.array_equal(to_pixels(images, 28, 1), X[:1]) else pytest.fail('one plane is one plane')
    with pytest.raises(BadInput) as e: predict(trained[0], images)
    assert all(o in str(e.value) for o in words) and '\n' not in str(e.value), str(e.value)

def test_files_that_are_no_image_for_the_model(trained, tmp_path):
    pil('L').save(tmp_path/'ok.png'); pil('RGB').save(tmp_path/'colour.png'); pil('L', (29, 28)).save(tmp_path/'wide.png'); pil('I;16').save(tmp_path/'deep.png')
    (tmp_path/'cut.png').write_bytes((tmp_path/'ok.png').read_bytes()[:50]); (tmp_path/'text.png').write_text('no image', encoding='utf-8'); (tmp_path/'empty.png').write_bytes(b''); (tmp_path/'d.png').mkdir()
    for name, word in dict(none='not a file', d='not a file', cut='cannot be read', text='cannot be read', empty='cannot be read', deep='more than 8 bits', colour='mode RGB', wide='29 x 28 pixels').items():
        for o in (tmp_path/f'{name}.png', [tmp_path/'ok.png', str(tmp_path/f'{name}.png')]):
            with pytest.raises(BadInput, match=f'{name}.png.*{word}'): predict(trained[0], o)
        if name in ('colour', 'wide'): assert len(predict(trained[0], o, resize=True)) == 2
        else: pytest.raises(BadInput, predict, trained[0], o, resize=True)
    with pytest.raises(BadInput, match='27'): predict(trained[0], X[:, :27], resize=True)  # arrays are never resized

def test_colour_images(colour, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    p = predict(colour, x)
    assert p.classes == ('cat', 'dog', 'owl') and p.logits.shape == (6, 3)
    net = integer_network(load_model(colour)[0], (3, 32, 32))
    assert np.array_equal(p.logits, net(torch.from_numpy(normalize_pixels(x, RGB['stats']))))
    assert not np.array_equal(p.logits, predict(colour, x[..., ::-1]).logits)  # BGR is another image
    for bad, word in ((x[..., :1], 'RGB'), (x[..., 0], r'\(6, 32, 32\)'), (x.transpose(0, 3, 1, 2), r'transpose\(0, 2, 3, 1\)'), (x[0].transpose(2, 0, 1), r'transpose\(1, 2, 0\)'), (np.zeros((32, 32, 4), np.uint8), r'\(32, 32, 4\)'), (pil('L', (32, 32)), 'mode L'), (pil('RGBA', (32, 32)), 'mode RGBA')):
        with pytest.raises(BadInput, match=word): predict(colour, bad)
    Image.fromarray(x[0, ..., 0]).save(tmp_path/'grey.png')
    assert np.array_equal(predict(colour, tmp_path/'grey.png', resize=True).logits, predict(colour, x[:1, ..., :1].repeat(3, -1)).logits)

# --- the same answers ---

def test_runtimes_agree_on_the_whole_sample(trained):
    x = np.concatenate([DIGITS.x_train, DIGITS.x_test])
    a, b, c = predict(trained[0], x), predict(trained[0], x, 'torch'), predict(trained[1], x, 'torch')
    assert len(a) == 3000 and (a.indices == np.concatenate([DIGITS.y_train, DIGITS.y_test])).mean() > .85
    for o in (b, c): assert (o.indices != a.indices).sum() <= 1 and np.quantile(np.abs(o.logits - a.logits), .9) < 1e-4 and np.abs(o.probs - a.probs).max() < .2
    net = integer_network(load_model(trained[0])[0], (1, 28, 28))
    xb = torch.from_numpy(normalize_pixels(DIGITS.x_test[:200], FACTS['stats']))
    assert np.array_equal(predict(trained[0], DIGITS.x_test[:200]).logits, net(xb))
    with torch.no_grad(): assert np.array_equal(predict(trained[0], DIGITS.x_test[:200], 'torch').logits, load_model(trained[0])[0](xb).numpy())

@pytest.mark.parametrize('runtime', ['onnxruntime', 'torch'])
def test_neither_batches_nor_threads_nor_layout_change_an_answer(trained, runtime):
    before, state, p = torch.get_num_threads(), torch.get_rng_state(), Predictor(trained[0], runtime)
    want, close = p(X).logits, (lambda a, b: np.array_equal(a, b)) if runtime == 'onnxruntime' else (lambda a, b: np.allclose(a, b, atol=1e-4))
    for batch in (1, 7, 40, 10_000): assert close(p(X, batch).logits, want)
    assert close(p(X[3]).logits, want[3:4]) and close(p(np.asfortranarray(X)[::-2]).logits, want[::-2]) and close(p(torch.from_numpy(X).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)).logits, want)
    assert close(predict(trained[0], X, runtime, threads=2).logits, want)
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)

def test_bad_arguments(trained):
    for kw, word in ((dict(runtime='tensorrt'), "runtime 'tensorrt' is unknown; allowed: onnxruntime, torch"), (dict(threads=0), 'threads is 0'), (dict(threads=1.5), 'threads is 1.5'), (dict(batch=0), 'batch is 0')):
        with pytest.raises(BadInput, match=word): predict(trained[0], X, **kw)

def test_onnxruntime_needs_no_torch(trained, tmp_path):
    "Neither to predict, from arrays or files, nor to refuse, nor on the command line."
    Image.fromarray(X[0, ..., 0]).save(tmp_path/'a.png')
    code = f"""import sys, numpy as np
from qisal.serve import predict
from qisal.core import BadInput
folder, image = {str(trained[0])!r}, {str(tmp_path/'a.png')!r}
heavy = lambda: [o for o in ('torch', 'fastai', 'pandas', 'matplotlib', 'scipy', 'captum', 'onnx', 'safetensors') if o in sys.modules]
a = predict(folder, np.zeros((2, 28, 28), np.uint8), runtime='onnxruntime')
repr(a), a.probs, a.labels
print(heavy() + [o for o in sys.modules if o == 'PIL'])
b = predict(folder, image)
try: predict(folder, [image, image + 'x'])
except BadInput: print(heavy())
from qisal.cli import app
app(['predict', image, '--model', folder], standalone_mode=False)
print(heavy())
assert 'onnxruntime' in sys.modules"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, encoding='utf-8').stdout.splitlines()
    assert out[:2] == ['[]', '[]'] and out[3] == '[]' and out[2].startswith(str(tmp_path/'a.png'))

def test_the_first_prediction_comes_soon(trained):
    "Half a second for importing this library, opening the folder and one image, when numpy and onnxruntime are loaded."
    code = f"""import time, numpy as np, onnxruntime
x, t = np.zeros((28, 28), np.uint8), time.perf_counter()
from qisal.serve import predict
predict({str(trained[0])!r}, x)
print(time.perf_counter() - t)"""
    took = []
    while not took or min(took) > .5 and len(took) < 6: took.append(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, encoding='utf-8').stdout))
    assert min(took) <= .5, took

def test_prediction():
    logits = np.random.default_rng(0).normal(0, 5, (12, 4)).astype(np.float32)
    logits[0], logits[1] = [1e30, -1e30, 0, 3], [7, 7, 7, 1]
    p = Prediction(tuple('abcd'), logits)
    assert np.allclose(p.probs, torch.from_numpy(logits).double().softmax(1).numpy(), atol=1e-7) and p.probs.dtype == np.float32
    assert len(p) == 12 and p.labels[:2] == ['a', 'a'] and list(p.indices) == list(logits.argmax(1)) and p.labels == ['abcd'[i] for i in logits.argmax(1)]
    assert repr(p).splitlines()[0] == 'Prediction of 12 images in 4 classes' and repr(p).splitlines()[1:3] == ['  0: a (100.0%)', '  1: a (33.3%)'] and repr(p).endswith('and 2 more')
    df = p.frame()
    assert list(df) == ['label', 'probability', 'p(a)', 'p(b)', 'p(c)', 'p(d)'] and len(df) == 12 and np.allclose(df.probability, p.probs.max(1)) and list(df.label) == p.labels
    with pytest.raises(AttributeError): p.logits = logits

# --- the folder ---

def seal(d, change=lambda c: None):
    "Write the checksums of the files as they are now, as somebody would who altered them on purpose."
    c = json.loads((d/'config.json').read_text(encoding='utf-8'))
    for name in c['files']: c['files'][name] = dict(sha256=deploy._sha((d/name).read_bytes()), bytes=(d/name).stat().st_size)
    change(c)
    (d/'config.json').write_text(json.dumps(deploy._sealed(c)), encoding='utf-8')

def copy(folder, tmp_path): return shutil.copytree(folder, tmp_path/'m')

@pytest.mark.parametrize('runtime,name,how', list(itertools.product(['onnxruntime', 'torch'], ['model.onnx', 'model.safetensors', 'README.md', 'config.json'], ['missing', 'truncated', 'emptied', 'longer', 'altered'])))
def test_no_file_may_be_missing_or_altered(trained, tmp_path, runtime, name, how):
    "Not even one that the runtime doesn't read."
    path = copy(trained[0], tmp_path)/name
    raw = path.read_bytes()
    if how == 'missing': path.unlink()
    else: path.write_bytes(dict(truncated=raw[:-2], emptied=b'', longer=raw + b'\0', altered=raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])[how])
    with pytest.raises(BadInput) as e: predict(tmp_path/'m', X, runtime)
    said = str(e.value)
    assert name in said and "m'" in said and '\n' not in said and any(o in said for o in ('get the folder again', 'give the folder that save_model wrote')), said
    if name != 'config.json': assert {'missing': 'is missing', 'altered': 'was altered'}.get(how, 'truncated or altered') in said, said

CONFIG = {
    'an edited class': (lambda d: (d/'config.json').write_text((d/'config.json').read_text(encoding='utf-8').replace('"classes": [\n  "0"', '"classes": [\n  "nil"'), encoding='utf-8'), 'config.json .* was altered'),
    'other statistics': (lambda d: (d/'config.json').write_text((d/'config.json').read_text(encoding='utf-8').replace('0.1307', '0.1308'), encoding='utf-8'), 'config.json .* was altered'),
    'a newer format': (lambda d: seal(d, lambda c: c.update(version=3)), r'format version 3, this qisal reads 1 to 2; update qisal \(pip install -U qisal\)'),
    'a version that is no number': (lambda d: seal(d, lambda c: c.update(version='one')), 'format version one'),
    'a file above the folder': (lambda d: (seal(d), seal_extra(d, '../x')), "names '../x', a file outside of the folder"),
    'an absolute path': (lambda d: seal_extra(d, os.path.abspath(os.sep) + 'x'), 'a file outside of the folder'),
    'a file in a subfolder': (lambda d: seal_extra(d, 'sub/x'), 'a file outside of the folder'),
    'no model.onnx in the list': (lambda d: seal(d, lambda c: c['files'].pop('model.onnx')), 'lists no model.onnx'),
    'fewer classes': (lambda d: seal(d, lambda c: c.update(classes=c['classes'][:9])), r'gives \[10\] logits, config.json says \[1, 28, 28\] and \[9\]'),
    'another size': (lambda d: seal(d, lambda c: c.update(size=32)), r'takes images \[1, 28, 28\]'),
}

def seal_extra(d, name): seal(d, lambda c: c['files'].update({name: dict(sha256='', bytes=0)}))

@pytest.mark.parametrize('name', CONFIG)
def test_configurations_that_are_refused(trained, tmp_path, name):
    how, message = CONFIG[name]
    d, before = copy(trained[0], tmp_path), (trained[0]/'config.json').read_text(encoding='utf-8')
    how(d)
    assert (d/'config.json').read_text(encoding='utf-8') != before
    with pytest.raises(BadInput, match=message) as e: predict(d, X)
    assert '\n' not in str(e.value)

class Evil:
    def __reduce__(self): return os.system, ('touch HACKED',)

def disguises():
    "A pickle in archives and arrays."
    import gzip, io, zipfile
    def zipped(name, before=b''):
        b = io.BytesIO()
        b.write(before)
        with zipfile.ZipFile(b, 'a') as z: z.writestr(name, pickle.dumps(Evil()))
        return b.getvalue()
    array, arrays = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Evil()], object), allow_pickle=True)
    np.savez(arrays, a=np.array([Evil()], object))
    return {'gzip': ('notes.gz', gzip.compress(pickle.dumps(Evil(), 0))), 'a zip with an upper-case name': ('a.zip', zipped('A.PKL')), 'a zip with a harmless name': ('b.zip', zipped('notes.txt')),
            'a zip behind other bytes': ('c.onnx', zipped('data.pkl', b'ONNX'*9)), 'a zip in a gzip': ('d.zip', gzip.compress(zipped('data.pkl'))),
            'an array of objects': ('e.npy', array.getvalue()), 'arrays of objects': ('f.npz', arrays.getvalue())}

PICKLES = {'an upper-case name': ('WEIGHTS.PKL', b''), 'a checkpoint': ('last.ckpt', b'\0'), 'in a subfolder': ('a/b/notes', pickle.dumps(Evil())), 'in a hidden folder': ('.cache/x', pickle.dumps(Evil(), 2)),
           **{f'protocol {i} as text': ('notes.txt', pickle.dumps(Evil(), i)) for i in range(6)}, **disguises(), 'torch.save as safetensors': ('extra.safetensors', 'zip'), 'torch.save of old as an image': ('map.png', 'old')}

@pytest.mark.parametrize('name', PICKLES)
def test_a_pickle_in_any_clothes(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    d, (file, raw) = copy(trained[0], tmp_path), PICKLES[name]
    (d/file).parent.mkdir(parents=True, exist_ok=True)
    if raw in ('zip', 'old'): torch.save({'a': Evil()}, d/file, _use_new_zipfile_serialization=raw == 'zip')
    else: (d/file).write_bytes(raw)
    for runtime in ('onnxruntime', 'torch'):
        with pytest.raises(BadInput, match=f'{os.path.basename(file)} in .* is a pickle'): predict(d, X, runtime)
    assert not (tmp_path/'HACKED').exists()

@pytest.mark.parametrize('name', ['model.onnx', 'README.md', 'model.safetensors'])
def test_a_pickle_in_place_of_a_file(trained, tmp_path, monkeypatch, name):
    "Sealed with checksums that fit."
    monkeypatch.chdir(tmp_path)
    d = copy(trained[0], tmp_path)
    (d/name).write_bytes(pickle.dumps(Evil()))
    seal(d)
    with pytest.raises(BadInput, match=f'{name} in .* is a pickle'): predict(d, X)
    assert not (tmp_path/'HACKED').exists()

def test_a_folder_without_onnx_file(trained, tmp_path):
    with pytest.raises(BadInput, match=r"lists no model.onnx.*export_model, or qisal export .*the runtime torch"): predict(trained[1], X)
    d = shutil.copytree(trained[1], tmp_path/'m')
    shutil.copy(trained[0]/'model.onnx', d)  # put there, but not what the folder says it holds
    with pytest.raises(BadInput, match='lists no model.onnx'): predict(d, X)
    assert len(predict(d, X, 'torch')) == len(X)
    for bad in (tmp_path/'none', trained[0]/'model.onnx'):
        with pytest.raises(BadInput, match='is no folder'): predict(bad, X)

def rewritten(folder, tmp_path, change):
    "A copy of the folder, sealed, whose ONNX file `change` has changed."
    d = copy(folder, tmp_path)
    m = onnx.load(d/'model.onnx')
    change(m)
    (d/'model.onnx').write_bytes(m.SerializeToString())
    seal(d)
    return d

NEWER = {'IR version': (lambda m: setattr(m, 'ir_version', 99), 'Unsupported model IR version: 99'), 'opset': (lambda m: setattr(m.opset_import[0], 'version', 99), 'guarantees.*99')}

@pytest.mark.parametrize('name', NEWER)
def test_an_onnxruntime_that_is_too_old(trained, tmp_path, name):
    change, word = NEWER[name]
    d = rewritten(trained[0], tmp_path, change)
    with pytest.raises(BadInput, match=rf"onnxruntime {onnxruntime.__version__} is too old for model.onnx in '.*m' \(.*{word}.*pip install -U onnxruntime.*--opset 21") as e: predict(d, X)
    assert '\n' not in str(e.value)
    assert len(predict(d, X, 'torch')) == len(X)  # the way out that is always there

SAID = {  # what released versions say
    'Fail': ('[ONNXRuntimeError] : 1 : FAIL : Load model from model.onnx failed:/onnxruntime_src/onnxruntime/core/graph/model.cc:150 onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::PathString&, const onnxruntime::IOnnxRuntimeOpSchemaRegistryList*, '
             'const onnxruntime::logging::Logger&, const onnxruntime::ModelOptions&) Unsupported model IR version: 10, max supported IR version: 9\n', 'too old.*Unsupported model IR version: 10, max supported IR version: 9\\)'),
    'NotImplemented': ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for BitwiseAnd(18) node with name ''", r'too old.*BitwiseAnd\(18\)'),
    'InvalidProtobuf': ('[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed:Protobuf parsing failed.', "can't open model.onnx in .*Protobuf parsing failed.*get the folder again")}

@pytest.mark.parametrize('kind', SAID)
def test_what_older_versions_say(trained, monkeypatch, kind):
    text, message = SAID[kind]
    error = getattr(onnxruntime.capi.onnxruntime_pybind11_state, kind)
    def session(*args, **kw): raise error(text)
    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    with pytest.raises(BadInput, match=message) as e: predict(trained[0], X)
    assert '\n' not in str(e.value) and 'onnxruntime_src' not in str(e.value)

def test_other_failures_are_not_dressed_up(trained, monkeypatch):
    def session(*args, **kw): raise MemoryError('no room')
    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    with pytest.raises(MemoryError): predict(trained[0], X)

def test_no_onnx_file_at_all(trained, tmp_path):
    d = copy(trained[0], tmp_path)
    (d/'model.onnx').write_bytes(b'not a graph')
    seal(d)
    with pytest.raises(BadInput, match="onnxruntime can't open model.onnx in '.*m'"): predict(d, X)

def test_a_network_of_ones_own_needs_no_code_in_onnxruntime(tmp_path):
    torch.manual_seed(0)
    m = bake(convert(Own(), bit_policy('4'), torch.from_numpy(normalize_pixels(X, FACTS['stats'])), input_range=(-.5, 2.9)))
    d = export_model(m, tmp_path/'m', **FACTS)
    with torch.no_grad(): want = m.eval()(torch.from_numpy(normalize_pixels(X, FACTS['stats']))).numpy()
    assert np.quantile(np.abs(predict(d, X).logits - want), .9) < 1e-3
    assert explain(d, X[0], 'onnxruntime').saliency.shape == (28, 28)
    with pytest.raises(BadInput, match=r'holds a Own, whose code only you have; choose the runtime onnxruntime.*load_model\(folder, model=Own'): predict(d, X, 'torch')

# --- explanations ---

def oracle(f, x, y, window, stride, base):
    "Occlusion, a patch at a time."
    n, c, h, w = x.shape
    total, count, want = np.zeros((n, h, w)), np.zeros((h, w)), f(x)[np.arange(n), y]
    for i in range(0, -(-(h - window)//stride)*stride + 1, stride):
        for j in range(0, -(-(w - window)//stride)*stride + 1, stride):
            covered = x.copy()
            covered[:, :, i:i + window, j:j + window] = base[:, :, i:i + window, j:j + window]
            total[:, i:i + window, j:j + window] += (want - f(covered)[np.arange(n), y])[:, None, None]
            count[i:i + window, j:j + window] += 1
    return total/count

@pytest.mark.parametrize('shape,window,stride,fill', [((3, 1, 28, 28), None, None, 'corner'), ((2, 3, 32, 32), None, None, 'corner'), ((2, 3, 9, 11), 3, 2, 'mean'), ((1, 2, 8, 8), 8, 1, .5), ((2, 1, 10, 10), 4, 3, 'corner'), ((2, 1, 6, 7), 1, 1, 'corner')], ids=str)
def test_occlusion_is_the_loop(shape, window, stride, fill):
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(shape, generator=g), torch.randn(5, int(np.prod(shape[1:])), generator=g)/10, torch.randint(0, 5, shape[:1], generator=g)
    f = lambda t: (t.flatten(1) @ w.T).tanh() + (t.flatten(1)**2 @ w.T)
    base = {'corner': x[:, :, :1, :1], 'mean': x.mean((2, 3), keepdim=True)}.get(fill, torch.tensor(.5)).expand_as(x)
    a = occlusion(f, x, y, window, stride, fill)
    want = oracle(lambda o: f(torch.from_numpy(o)).numpy(), x.numpy(), y.numpy(), window or 4, stride or 2, base.numpy())
    assert a.shape == x.shape and torch.equal(a, a[:, :1].expand_as(a)) and np.allclose(a[:, 0], want, atol=1e-4)
    assert torch.allclose(occlusion(f, x, y, window, stride, fill, batch_size=1), a, atol=1e-5)

def test_occlusion_keeps_the_mode_and_refuses():
    m, x, y = nn.Sequential(nn.Flatten(), nn.Dropout(.9), nn.Linear(64, 3)).train(), torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.equal(occlusion(m, x, y), occlusion(m, x, y)) and m.training and m[1].training and m[2].weight.grad is None
    for kw, word in ((dict(window=9), 'window is 9'), (dict(window=0), 'window is 0'), (dict(window=2, stride=3), 'stride is 3'), (dict(stride=0), 'stride is 0'), (dict(fill='median'), 'median'), (dict(batch_size=0), 'batch_size')):
        with pytest.raises(BadInput, match=word): occlusion(m, x, y, **kw)

def test_asking_the_integers_is_asking_the_network(trained):
    "Occlusion through onnxruntime, through the same network in torch, and the loop, on integers."
    net = integer_network(load_model(trained[0])[0], (1, 28, 28))
    asked = Predictor(trained[0])
    in_torch = Predictor(trained[0], 'torch')
    far = []
    for i in range(6):
        a, b = asked.explain(X[i]), in_torch.explain(X[i], 'occlusion')
        x = normalize_pixels(X[i:i + 1], FACTS['stats'])
        want = np.abs(oracle(lambda o: net(torch.from_numpy(o)), x, [a.target], 4, 2, np.broadcast_to(x[:, :, :1, :1], x.shape))[0])
        assert np.allclose(a.saliency, want, atol=1e-5) and (a.label, a.target, a.method) == (b.label, b.target, 'occlusion')
        far.append(np.quantile(np.abs(a.saliency - b.saliency), .9))
    assert max(far) < 1e-4, far  # the rest are ties in rounding

def test_explain(trained):
    for folder, runtime in ((trained[0], 'torch'), (trained[1], 'torch'), (trained[0], 'onnxruntime')):
        e = explain(folder, X[0], runtime)
        assert e.label == '7' == e.prediction.labels[0] and e.saliency.shape == (28, 28) and e.saliency.dtype == np.float32 and e.saliency.min() >= 0 < e.saliency.max() and np.array_equal(e.image, X[0])
        assert e.method == ('gradient' if runtime == 'torch' else 'occlusion') and "'7'" in repr(e) and '7 (' in e.plot().get_suptitle()
    e = explain(trained[0], X[0], 'torch', target='3')
    assert (e.label, e.target) == ('3', 3) and np.array_equal(e.saliency, explain(trained[0], X[0], 'torch', target=3).saliency) and not np.array_equal(e.saliency, explain(trained[0], X[0]).saliency)
    from qisal.saliency import attribute
    want = attribute(load_model(trained[0])[0], torch.from_numpy(normalize_pixels(X[:1], FACTS['stats'])), torch.tensor([3]))[0, 0].abs()
    assert np.array_equal(e.saliency, want.numpy())

def test_explain_is_repeatable_and_leaves_no_trace(trained):
    state, before = torch.get_rng_state(), torch.get_num_threads()
    for method in ('smoothgrad', 'random'):
        a, b = (explain(trained[0], X[0], 'torch', method, threads=2).saliency for _ in range(2))
        assert np.array_equal(a, b)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == before

def test_explain_refuses(trained):
    for args, word in (((X[:2],), 'takes one image, not 2'), ((X[0], 'onnxruntime', 'gradient'), 'gradient needs a network in torch.*occlusion'), ((X[0], 'torch', 'lime'), "method 'lime' is unknown"),
                       ((X[0], 'torch', None, '10'), "target '10' is unknown"), ((X[0], 'torch', None, 10), 'target is 10'), ((X[0], 'torch', None, -1), 'target is -1')):
        with pytest.raises(BadInput, match=word): explain(trained[0], *args)

# --- bytes altered at random ---

def test_bytes_altered_at_random_end_in_one_sentence_or_an_answer(trained, tmp_path, capfd):
    "Of each file, sealed again or not; onnxruntime prints nothing of its own."
    import random
    from test_deploy import altered
    want, said, known = predict(trained[0], X[:4]).logits, [], (trained[0]/'model.onnx').read_bytes()
    for seed in range(220):
        rng, d = random.Random(seed), tmp_path/'m'
        shutil.rmtree(d, ignore_errors=True); shutil.copytree(trained[0], d)
        name = rng.choice(['model.onnx']*3 + sorted(o.name for o in d.iterdir()))
        (d/name).write_bytes(altered((d/name).read_bytes(), rng))
        sealed = rng.random() < .75
        if sealed:
            try: seal(d)
            except (ValueError, KeyError, TypeError, AttributeError, OSError): pass
        try: p = predict(d, X[:4])
        except BadInput as e: said.append(str(e)); continue
        assert np.isfinite(p.logits).all() and p.logits.shape == (4, 10)
        if not sealed or (d/'model.onnx').read_bytes() == known and name != 'config.json': assert np.array_equal(p.logits, want)
    assert 110 < len(said) < 220 and not any('\n' in o for o in said)
    assert any("can't open model.onnx" in o for o in said) and any('was altered' in o for o in said)
    assert ''.join(capfd.readouterr()) == ''

def test_text_that_is_no_utf8_in_an_onnx_file(trained, tmp_path, capfd):
    "A broken name of an operator: Python's error about it, and what onnxruntime prints, become one sentence."
    d, bad = copy(trained[0], tmp_path), (trained[0]/'model.onnx').read_bytes().replace(b'QLinearConv', b'QLinear\xd8onv')
    (d/'model.onnx').write_bytes(bad)
    seal(d)
    with pytest.raises(BadInput, match="onnxruntime can't open model.onnx in .*get the folder again") as e: predict(d, X)
    assert '\n' not in str(e.value) and ''.join(capfd.readouterr()) == ''

def test_a_file_that_fails_while_it_runs_or_answers_with_nan(trained, tmp_path, capfd):
    m = onnx.load(trained[0]/'model.onnx')
    consts = {o.name: o for o in m.graph.initializer}
    gemm = next(o for o in m.graph.node if o.op_type == 'Gemm')
    scale = next(o for o in m.graph.node if gemm.input[1] in o.output).input[1]
    d = copy(trained[0], tmp_path)
    for change, message in ((lambda: consts[scale].CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), scale)), 'answers with NaN or infinity'),
                            (lambda: next(o for o in m.graph.node if o.op_type == 'Flatten').attribute.append(onnx.helper.make_attribute('axis', 0)), "can't run model.onnx in .*MatMulInteger")):
        change()
        (d/'model.onnx').write_bytes(m.SerializeToString())
        seal(d)
        with pytest.raises(BadInput, match=message) as e: predict(d, X)
        assert '\n' not in str(e.value)
    assert ''.join(capfd.readouterr()) == ''

# --- transparent drawings ---

INK = X[0, ..., 0]

def drawing(mode, ink=INK):
    "Black strokes on nothing, in every mode that can be transparent."
    rgba = Image.fromarray(np.dstack([0*ink, 0*ink, 0*ink, ink]), 'RGBA')
    if mode in ('RGBA', 'LA', 'PA'): return rgba.convert(mode)
    img = Image.fromarray(np.where(ink > 127, 0, 200).astype(np.uint8)).convert(mode)
    img.info['transparency'] = (200, 200, 200) if mode == 'RGB' else img.getpixel((0, 0))
    return img

@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L', 'RGB'])
def test_a_transparent_drawing_is_laid_over_a_background(tmp_path, mode):
    import warnings
    img, black = drawing(mode), INK > 127
    img.save(tmp_path/'a.png')
    for o in (img, tmp_path/'a.png'):
        with pytest.warns(UserWarning, match=r"The image is transparent and was laid over white; say what it was in training: background='white' or 'black' \(qisal predict --background\)"): white = to_pixels(o, 28, 1, resize=True)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert np.array_equal(to_pixels(o, 28, 1, True, 'white'), white)
            dark = to_pixels(o, 28, 1, True, 'black')
            assert np.array_equal(np.asarray(read_image(o, 28, 1, 'white')), white[0, ..., 0])
        if mode in ('RGBA', 'LA'): assert np.array_equal(white[0, ..., 0], 255 - INK) and not dark.any()
        else: assert (white[0, ..., 0] == np.where(black, 0, 255)).all() and not dark.any()
    with pytest.raises(BadInput, match="background 'green' is unknown; allowed: white, black"): to_pixels(img, 28, 1, True, 'green')

def test_opaque_images_are_left_alone(tmp_path, recwarn):
    full = Image.fromarray(np.dstack([INK, INK, INK, 0*INK + 255]), 'RGBA')
    assert np.array_equal(to_pixels(full, 28, 1, True), X[:1]) and np.array_equal(to_pixels(X, 28, 1), X) and not len(recwarn)

def test_the_number_of_transparent_images_is_told_once(trained, tmp_path):
    files = []
    for i in range(5):
        files.append(tmp_path/f'{i}.png')
        (drawing('RGBA', X[i, ..., 0]) if i < 3 else Image.fromarray(X[i, ..., 0])).save(files[-1])
    with pytest.warns(UserWarning, match='3 of 5 images are transparent and were laid over white') as said: p = predict(trained[0], files, resize=True)
    assert len(said) == 1
    assert np.array_equal(p.logits, predict(trained[0], np.concatenate([255 - X[:3], X[3:5]])).logits)
    with pytest.raises(BadInput, match='mode RGBA.*--resize'): predict(trained[0], files)  # another mode is still refused

def test_the_folder_says_what_the_background_was(trained, tmp_path, recwarn):
    from test_export import convs
    d = export_model(convs(), tmp_path/'m', background='black', **FACTS)
    ink = X[0, ..., 0]
    img = Image.fromarray(np.dstack([ink*0 + 255]*3 + [ink]), 'RGBA')  # white strokes on nothing
    assert np.array_equal(predict(d, img, resize=True).logits, predict(d, X[:1]).logits)
    for e in (explain(d, img, 'onnxruntime', resize=True), Predictor(d).explain(img, resize=True)): assert np.array_equal(e.image, X[0])
    assert not len(recwarn)
    assert (Predictor(d, background='white').pixels(img, resize=True) == 255).all()
    with pytest.raises(BadInput, match="background 'grey' is unknown"): Predictor(d, background='grey')

# --- images that are not square ---

def test_images_that_are_not_square(tmp_path):
    from test_export import digits, small
    x = X[:, 4:24]
    m = small(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4*5*7, 10), xb=digits(64)[:, :, 4:24])
    d = export_model(m, tmp_path/'m', **{**FACTS, 'size': (20, 28)})
    p = predict(d, x)
    assert repr(Predictor(d)).split(': ')[1].startswith('20 x 28 x 1 -> ')
    net = integer_network(m, (1, 20, 28))
    assert np.array_equal(p.logits, net(torch.from_numpy(normalize_pixels(x, FACTS['stats']))))
    Image.fromarray(x[0, ..., 0]).save(tmp_path/'a.png')
    assert np.array_equal(predict(d, tmp_path/'a.png').logits, p.logits[:1]) and read_image(Image.new('L', (90, 30)), (20, 28), 1).size == (28, 20)
    assert explain(d, x[0], 'onnxruntime').saliency.shape == (20, 28)
    for bad, message in ((x.transpose(0, 2, 1, 3), r'\(40, 28, 20, 1\); the model takes 20 x 28 pixels'), (Image.new('L', (20, 28)), r'20 x 28 pixels \(width x height\), the model takes 20 x 28 pixels \(height x width\)'), (x[0].transpose(2, 0, 1)[None].repeat(2, 0), r'put the channels last')):
        with pytest.raises(BadInput, match=message): predict(d, bad)
