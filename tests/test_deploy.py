"The model folder: there and back for every architecture and policy, every fault, every place to write to."
import json, os, pickle, shutil
import pytest, torch
from torch import nn
import qisal.deploy as deploy
from qisal.core import ARCHS, BadInput
from qisal.deploy import load_model, read_config, save_model
from qisal.models import get_model
from qisal.quant import apply_quant_config, bake, bit_policy, convert, quant_config

GREY = dict(classes=[str(i) for i in range(10)], n_in=1, size=28, stats=([.13], [.31]))
RGB = dict(classes=[str(i) for i in range(10)], n_in=3, size=32, stats=([.5]*3, [.25]*3))

def network(arch='small_cnn', bits='4', facts=GREY, seed=0, **kw):
    "A network whose batch norms, alphas and weights are not those of a fresh one."
    torch.manual_seed(seed)
    xb = torch.randn(4, facts['n_in'], facts['size'], facts['size'])
    m = get_model(arch, 10, facts['n_in'], facts['size'])
    if bits != '32': convert(m, bit_policy(bits), xb, input_range=(-3., 3.5), **kw)
    m.train()
    with torch.no_grad():
        m(xb)
        for p in m.parameters(): p.mul_(1 + .1*torch.rand_like(p))
    return m

def same(a, b, facts=GREY):
    xb = torch.randn(8, facts['n_in'], facts['size'], facts['size'], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): return torch.equal(a.eval()(xb), b(xb))

CASES = [('small_cnn', b, GREY, {}) for b in ('32', '8', '4', '3', '2', '4/2', 'w2a4', 'w4a2')] + [
    ('small_cnn', '4', GREY, dict(weight_quantizer='dorefa')), ('small_cnn', '2', GREY, dict(weight_quantizer='sawb_zero', per_channel=True)),
    ('lenet5', '4/2', GREY, {}), ('resnet20', '4', RGB, {}), ('resnet20', '32', RGB, {}), ('resnet18', '2', RGB, {})]

@pytest.mark.parametrize('arch,bits,facts,kw', CASES, ids=[f'{a}-{b}-{"-".join(map(str, k.values()))}' for a, b, _, k in CASES])
def test_there_and_back(tmp_path, arch, bits, facts, kw):
    m = network(arch, bits, facts, **kw)
    save_model(m, tmp_path/'m', **facts)
    assert m.training  # left as it was
    got, c = load_model(tmp_path/'m')
    assert same(m, got, facts) and not got.training and not same(network(arch, bits, facts, seed=1, **kw), got, facts)
    assert (c['arch'], c['classes'], c['n_in'], c['size']) == (arch, facts['classes'], facts['n_in'], facts['size'])
    assert c['quant'] == (None if bits == '32' else quant_config(m))
    assert got.state_dict().keys() == m.state_dict().keys()
    assert [p.requires_grad for p in got.parameters()] == [p.requires_grad for p in m.parameters()]

def test_baked_weights_stay_baked(tmp_path):
    m = bake(network(bits='2'))
    save_model(m, tmp_path/'m', **GREY)
    got, c = load_model(tmp_path/'m')
    assert c['baked'] and same(m, got) and len(got[2].weight.unique()) <= 4
    assert not read_config(save_model(network(bits='2'), tmp_path/'n', **GREY))['baked']

def test_a_learner_brings_its_facts(tmp_path):
    from qisal.data import get_dls
    from fastai.learner import Learner
    dls = get_dls('mnist', sample=True)
    learn = Learner(dls, network('lenet5'))
    got, c = load_model(save_model(learn, tmp_path/'m', extra=dict(accuracy=.5)))
    assert same(learn.model.cpu(), got) and c['classes'] == [str(o) for o in dls.vocab] and c['extra'] == {'accuracy': .5}
    assert c['stats'] == [[float(v) for v in o] for o in dls.stats]

def test_config_is_strict_json_without_paths(tmp_path):
    text = (save_model(network(), tmp_path/'m', **GREY)/'config.json').read_text(encoding='utf-8')
    json.loads(text, parse_constant=lambda o: pytest.fail(f'{o} is no JSON'))
    assert str(tmp_path) not in text and os.path.expanduser('~') not in text

# --- faults in a folder ---

def flip(path, at=.5):
    raw = bytearray(path.read_bytes()); raw[int(len(raw)*at)] ^= 1; path.write_bytes(raw)

def edit(**kw):
    def how(d):
        c = json.loads((d/'config.json').read_text(encoding='utf-8')); c.update(kw)
        (d/'config.json').write_text(json.dumps(c), encoding='utf-8')
    return how

def forge(change):
    "Edit the configuration and seal it again, as somebody with bad intentions would."
    def how(d):
        c = json.loads((d/'config.json').read_text(encoding='utf-8')); change(c)
        (d/'config.json').write_text(json.dumps(deploy._sealed(c)), encoding='utf-8')
    return how

def weights_instead(raw):
    def how(d):
        (d/'model.safetensors').write_bytes(raw)
        forge(lambda c: c['files'].update({'model.safetensors': dict(sha256=deploy._sha(raw), bytes=len(raw))}))(d)
    return how

def put(name, raw): return lambda d: (d/name).write_bytes(raw)

FAULTS = {
    'no config': (lambda d: (d/'config.json').unlink(), 'no config.json'),
    'cut config': (lambda d: os.truncate(d/'config.json', 200), 'config.json .* cut off or no JSON'),
    'config not utf-8': (lambda d: (d/'config.json').write_bytes(b'\xff\xfe{'), 'config.json .* no JSON'),
    'config of something else': (put('config.json', b'{"model_type": "bert"}'), 'not that of a qisal model'),
    'config a list': (put('config.json', b'[]'), 'not that of a qisal model'),
    'edited config': (edit(size=32), 'config.json .* was altered'),
    'newer': (edit(version=3), 'format version 3, this qisal reads 1 to 2; update qisal'),
    'no weights': (lambda d: (d/'model.safetensors').unlink(), 'model.safetensors is missing'),
    'cut weights': (lambda d: os.truncate(d/'model.safetensors', 4000), 'model.safetensors .* truncated'),
    'empty weights': (lambda d: os.truncate(d/'model.safetensors', 0), 'model.safetensors .* 0 bytes'),
    'flipped weights': (lambda d: flip(d/'model.safetensors'), 'model.safetensors .* was altered'),
    'flipped header': (lambda d: flip(d/'model.safetensors', .001), 'model.safetensors .* was altered'),
    'pickle by name': (put('optimizer.pkl', b''), 'optimizer.pkl .* is a pickle'),
    'pickle by content': (put('notes', pickle.dumps({})), 'notes .* is a pickle'),
    'pickle as torch saves it': (lambda d: torch.save({'a': 1}, d/'weights.bin'), 'weights.bin .* is a pickle'),
    'path outside': (forge(lambda c: c['files'].update({'../x': dict(sha256='', bytes=0)})), 'outside of the folder'),
    'unknown weights': (forge(lambda c: c['weights'].update(kind='pickled')), "kind of weights 'pickled' is unknown"),
    'weights not listed': (forge(lambda c: c.update(files={})), "doesn't list its weights"),
    'missing entry': (forge(lambda c: c.pop('quant')), 'lacks quant'),
    'layer without bits': (forge(lambda c: c['quant']['layers']['0'].pop('w_bits')), "config.json doesn't describe the network fully"),
    'unknown argument': (forge(lambda c: c['arch_args'].update(depth=3)), "config.json doesn't describe the network fully"),
    'unknown arch': (forge(lambda c: c.update(arch='vgg')), "arch 'vgg' is unknown"),
    'other layers': (forge(lambda c: c['quant']['layers'].update({'77': c['quant']['layers'].pop('0')})), 'another architecture'),
    'no safetensors': (weights_instead(b'not tensors'), 'model.safetensors is no safetensors file'),
    'pickle as weights': (weights_instead(pickle.dumps({'a': 1})), 'is a pickle'),
}

@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_model(network('lenet5'), tmp_path_factory.mktemp('saved')/'m', **GREY)

@pytest.mark.parametrize('name', FAULTS)
def test_faults(saved, tmp_path, name):
    how, message = FAULTS[name]
    shutil.copytree(saved, tmp_path/'m')
    how(tmp_path/'m')
    with pytest.raises(BadInput, match=message) as e: load_model(tmp_path/'m')
    assert '\n' not in str(e.value)

def test_tensors_of_another_network(saved, tmp_path):
    from safetensors.torch import save
    shutil.copytree(saved, tmp_path/'m')
    weights_instead(save({'a': torch.zeros(2)}))(tmp_path/'m')
    with pytest.raises(BadInput, match="model.safetensors doesn't fit"): load_model(tmp_path/'m')

def test_no_folder(tmp_path):
    with pytest.raises(BadInput, match='is no folder'): load_model(tmp_path/'none')
    (tmp_path/'file').write_text('', encoding='utf-8')
    with pytest.raises(BadInput, match='is no folder'): load_model(tmp_path/'file')

def test_other_files_are_left_alone(saved, tmp_path):
    shutil.copytree(saved, tmp_path/'m')
    (tmp_path/'m'/'README.md').write_text('# a card', encoding='utf-8'); (tmp_path/'m'/'figure.zip').write_bytes(b'PK\x03\x04 cut')
    load_model(tmp_path/'m')

def test_nothing_is_unpickled(saved, monkeypatch):
    for o in ('load', 'loads', 'Unpickler'): monkeypatch.setattr(pickle, o, lambda *a, **k: pytest.fail('unpickled'))
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('torch.load'))
    load_model(saved)

# --- faults while saving ---

def test_missing_facts_are_named(tmp_path):
    with pytest.raises(BadInput, match="doesn't know size, stats"): save_model(network(), tmp_path/'m', classes=GREY['classes'], n_in=1)
    with pytest.raises(BadInput, match='one number for each of the 1 channels'): save_model(network(), tmp_path/'m', **{**GREY, 'stats': ([.1]*3, [.2]*3)})
    with pytest.raises(BadInput, match='no lenet5'): save_model(network(), tmp_path/'m', arch='lenet5', **GREY)
    with pytest.raises(BadInput, match="arch 'lenet' is unknown"): save_model(network(), tmp_path/'m', arch='lenet', **GREY)
    assert not list(tmp_path.iterdir())

def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path/'f').write_text('mine', encoding='utf-8'); (tmp_path/'d').mkdir(); (tmp_path/'d'/'x.txt').write_text('mine', encoding='utf-8')
    for place in ('f', 'd', 'none/m'):
        with pytest.raises(BadInput): save_model(network(), tmp_path/place, **GREY)
    assert (tmp_path/'f').read_text(encoding='utf-8') == (tmp_path/'d'/'x.txt').read_text(encoding='utf-8') == 'mine' and len(list(tmp_path.iterdir())) == 2

def test_an_older_model_is_replaced_and_an_empty_folder_used(tmp_path):
    (tmp_path/'m').mkdir()
    save_model(network(seed=1), tmp_path/'m', **GREY)
    new = network(seed=2)
    save_model(new, tmp_path/'m', **GREY)
    assert same(new, load_model(tmp_path/'m')[0]) and [o.name for o in tmp_path.iterdir()] == ['m']

@pytest.mark.parametrize('fails', ['write', 'rename'])
def test_a_failed_save_leaves_the_older_model(tmp_path, monkeypatch, fails):
    old = network(seed=1)
    save_model(old, tmp_path/'m', **GREY)
    real, real_write, n = os.replace, deploy.write_atomic, [0]
    def write(path, data):
        if path.name == 'config.json': raise OSError(28, 'No space left on device')
        return real_write(path, data)
    def rename(a, b):
        if str(b).endswith('/m'):
            n[0] += 1
            if n[0] == 1: raise OSError(5, 'Input/output error')
        return real(a, b)
    if fails == 'write': monkeypatch.setattr(deploy, 'write_atomic', write)
    else: monkeypatch.setattr(os, 'replace', rename)
    with pytest.raises(OSError): save_model(network(seed=2), tmp_path/'m', **GREY)
    monkeypatch.undo()
    assert same(old, load_model(tmp_path/'m')[0]) and [o.name for o in tmp_path.iterdir()] == ['m']

def test_a_network_that_only_looks_like_one_of_ours(tmp_path):
    m = network(bits='32')
    m[4] = nn.AvgPool2d(2)  # the same parameters, another function
    with pytest.raises(BadInput, match='answers differently'): save_model(m, tmp_path/'m', **GREY)
    assert not list(tmp_path.iterdir())

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Linear(4*49, 10)
    def forward(self, x): return self.fc(self.act(self.conv(x)).flatten(1))

def test_own_network(tmp_path):
    m = convert(Own(), bit_policy('4'), torch.randn(2, 1, 28, 28))
    save_model(m, tmp_path/'m', **GREY)
    with pytest.raises(BadInput, match=r'holds a Own.*load_model\(folder, model=Own'): load_model(tmp_path/'m')
    assert same(m, load_model(tmp_path/'m', model=Own())[0])
    with pytest.raises(BadInput): load_model(tmp_path/'m', model=nn.Linear(2, 2))

# --- configurations that nobody wrote ---

def nested(n): return b'{"a":'*n + b'1' + b'}'*n

@pytest.mark.parametrize('n', [990, 5000, 200_000])
def test_deeply_nested_json(saved, tmp_path, n):
    "More levels than Python's stack: in the text, and in an entry of an otherwise whole configuration."
    shutil.copytree(saved, tmp_path/'m')
    text = (tmp_path/'m'/'config.json').read_text(encoding='utf-8')
    for raw in (nested(n), text.replace('"extra": {}', f'"extra": {nested(n).decode()}').encode(), b'['*n):
        (tmp_path/'m'/'config.json').write_bytes(raw)
        with pytest.raises(BadInput, match='config.json') as e: load_model(tmp_path/'m')
        assert '\n' not in str(e.value) and len(str(e.value)) < 600

KINDS = {
    'an unknown field': (lambda c: c.update(rotation=90), r"fields that this qisal doesn't know \(rotation\), so it could be read wrongly; update qisal"),
    'classes a text': (lambda c: c.update(classes='0123456789'), 'holds something else than save_model writes .*classes'), 'classes of numbers': (lambda c: c.update(classes=[0]*10), "names '0' more than once"),
    'files a list': (lambda c: c.update(files=[]), 'files'), 'a file without a hash': (lambda c: c['files'].update(x=3), r"files\['x'\]"), 'a size of text': (lambda c: c.update(size='28'), "size is '28'"),
    'no channel': (lambda c: c.update(n_in=0), 'n_in is 0'), 'statistics for two': (lambda c: c.update(stats=[[.1]*2, [.1]*2]), 'one number for each of the 1 channels'), 'statistics of text': (lambda c: c.update(stats=[['a'], [1]]), 'stats|float'),
    'a deviation of 0': (lambda c: c.update(stats=[[.1], [0.]]), 'deviation'), 'weights a list': (lambda c: c.update(weights=[]), 'weights'), 'quant a list': (lambda c: c.update(quant=[1]), 'quant'), 'extra a text': (lambda c: c.update(extra='a'), 'extra'),
    'arch a number': (lambda c: c.update(arch=3), 'arch'), 'arguments a list': (lambda c: c.update(arch_args=[]), 'arch_args'), 'another background': (lambda c: c.update(background='green'), "background 'green' is unknown"),
    'layers a list': (lambda c: c['quant'].update(layers=[]), "doesn't describe the network fully"), 'a layer of text': (lambda c: c['quant']['layers'].update({'0': 'a'}), "doesn't describe the network fully")}

@pytest.mark.parametrize('name', KINDS)
def test_entries_of_another_kind(saved, tmp_path, name):
    change, message = KINDS[name]
    shutil.copytree(saved, tmp_path/'m')
    forge(change)(tmp_path/'m')
    with pytest.raises(BadInput, match=message) as e: load_model(tmp_path/'m')
    assert '\n' not in str(e.value)

def test_tensors_that_are_no_numbers(saved, tmp_path):
    from safetensors.torch import load_file, save
    shutil.copytree(saved, tmp_path/'m')
    tensors = load_file(saved/'model.safetensors')
    tensors['3.bias'][2] = float('nan')
    weights_instead(save(tensors))(tmp_path/'m')
    with pytest.raises(BadInput, match=r'3 \(QConv2d\) of model.safetensors has NaN or infinity in its bias \(1 of 16 numbers\)'): load_model(tmp_path/'m')

def altered(raw, rng):
    "Some bytes changed, taken out or put in, in the first 400 or anywhere."
    raw, top = bytearray(raw), min(len(raw), 400) if rng.random() < .5 else len(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, how = rng.randrange(top), rng.random()
        if how < .4: raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif how < .7: raw[at % len(raw)] = rng.randrange(256)
        elif how < .85: del raw[at:at + rng.choice([1, 3, 20])]
        else: raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4])))
    return bytes(raw)

def test_bytes_altered_at_random(saved, tmp_path):
    "Sealed again or not: one sentence, or a network (of the altered numbers, where the checksums were put right)."
    import random
    from test_serve import seal
    said = []
    for seed in range(100):
        rng, d = random.Random(seed), tmp_path/'m'
        shutil.rmtree(d, ignore_errors=True); shutil.copytree(saved, d)
        name = rng.choice(['config.json', 'model.safetensors'])
        (d/name).write_bytes(altered((d/name).read_bytes(), rng))
        sealed = rng.random() < .75
        if sealed:
            try: seal(d)
            except (ValueError, KeyError, TypeError, AttributeError, OSError): pass  # no configuration is left that could be sealed
        try: got = load_model(d)[0]
        except BadInput as e: said.append(str(e)); continue
        with torch.no_grad(): assert sealed and got(torch.zeros(1, 1, 28, 28)).shape == (1, 10) or same(network('lenet5'), got)
    assert 50 < len(said) < 100 and not any('\n' in o for o in said)

def test_no_bytes_break_the_search_for_pickles():
    import random
    rng = random.Random(0)
    heads = [b'', b'\x80\x04', b'\x1f\x8b\x08', b'PK\x03\x04', b'\x93NUMPY', b'(', b'cos\nsystem\n', pickle.dumps({'a': [1.5, 'b']}, 0), pickle.dumps({'a': [1.5, 'b']}, 4)]
    for _ in range(3000): deploy._holds_pickle('notes', rng.choice(heads) + rng.randbytes(rng.randrange(60)))

def test_several_processes_write_one_folder(tmp_path):
    "The last one stays, whole; nothing is left beside it."
    from concurrent.futures import ThreadPoolExecutor
    config, n = {'size': 1}, 24
    def write(i): return deploy._write_folder(tmp_path/'m', {**config, 'who': i}, {'a': b'%d' % i, 'b': b'%d' % i})
    with ThreadPoolExecutor(8) as pool: list(pool.map(write, range(n)))
    assert [o.name for o in tmp_path.iterdir()] == ['m']
    assert json.loads((tmp_path/'m'/'config.json').read_text(encoding='utf-8'))['who'] == int((tmp_path/'m'/'a').read_bytes()) == int((tmp_path/'m'/'b').read_bytes())

@pytest.mark.parametrize('wrap', [torch.optim.swa_utils.AveragedModel, nn.DataParallel, lambda m: torch.compile(m, backend='eager'),
                                  lambda m: torch.optim.swa_utils.AveragedModel(torch.compile(m, backend='eager'))],
                         ids=['averaged', 'parallel', 'compiled', 'averaged-compiled'])
def test_the_network_inside_a_wrapper_is_saved_and_exported(tmp_path, wrap):
    m = network('lenet5').eval()
    for write in (save_model, deploy.export_model):
        got, c = load_model(write(wrap(m), tmp_path/write.__name__, **GREY))
        assert c['arch'] == 'lenet5' and same(bake(m) if c['baked'] else m, got)

def test_what_can_not_be_written_as_json_or_utf8_is_refused(tmp_path):
    m = network('lenet5')
    for write in (save_model, deploy.export_model):
        for extra in (dict(accuracy=float('nan')), dict(a=object())):
            with pytest.raises(BadInput, match="extra can't be kept as JSON"): write(m, tmp_path/'m', extra=extra, **GREY)
        with pytest.raises(BadInput, match='the class .* is not UTF-8'):
            write(m, tmp_path/'m', **{**GREY, 'classes': ['\udcff', *GREY['classes'][1:]]})
    assert not list(tmp_path.iterdir())

def test_a_quantized_network_is_not_filled_again(tmp_path):
    m = network('lenet5')
    save_model(m, tmp_path/'m', **GREY)
    with pytest.raises(BadInput, match='is quantized already; give a fresh float one'): load_model(tmp_path/'m', model=m)

def test_steps_of_the_data_that_a_folder_does_not_hold_are_told(tmp_path, recwarn):
    "A network of squeezed pictures has 50 % of them right where the file's pictures are cropped, and nothing said so."
    import numpy as np
    import qisal.data  # noqa: F401  (imports fastai without its warnings)
    from fastai.learner import Learner
    from fastai.vision.augment import Brightness, Flip, Resize
    from fastai.vision.core import TensorImage
    from fastai.vision.data import ImageDataLoaders, Normalize
    from fasttransform import Transform
    from PIL import Image
    class Inverted(Transform):
        def encodes(self, x:TensorImage): return 1 - x
    for name in 'ab':
        (tmp_path/'data'/name).mkdir(parents=True)
        for i in range(8): Image.fromarray(np.full((30, 50, 3), 20*i, np.uint8)).save(tmp_path/'data'/name/f'{i}.png')
    def told(resize, *steps):
        recwarn.clear()
        dls = ImageDataLoaders.from_folder(tmp_path/'data', valid_pct=.5, bs=4, item_tfms=resize, num_workers=0, batch_tfms=steps)
        save_model(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2))), tmp_path/'m')
        return [str(o.message) for o in recwarn if "learner's data go through" in str(o.message)]
    norm = Normalize.from_stats([.5]*3, [.2]*3)
    assert told(Resize(16), norm) == told(Resize(16), Flip(), Brightness(), norm) == []
    [squeezed], [padded] = told(Resize(16, method='squish'), norm), told(Resize(16, method='pad'))
    [inverted] = told(Resize(16), Inverted())
    assert "through Resize(method='squish'), which" in squeezed and "method='pad'" in padded and 'through Inverted, which' in inverted
